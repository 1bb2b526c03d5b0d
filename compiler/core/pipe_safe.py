"""Bytes on their way to somebody who may stop listening."""

import os
from io import FileIO


class PipeSafeStream(FileIO):
    """A file or stream that turns into /dev/null when its reader has left; stdout and stderr do so whatever they can't
    take, so that no verb breaks off where it says something.

    is_disconnected  whether nobody hears it any more
    full   why stdout could not take an answer, of which somebody has to be told in the end
    """

    is_disconnected = False
    full: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                if self.fileno() > 2:
                    raise
                self.full = error
        self.is_disconnected = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.fileno())  # processes and libraries that write there by themselves outlive it, too
        os.close(devnull)
        return len(data)
