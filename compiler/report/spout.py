"""Bytes on their way to somebody who may stop listening."""

import os
from io import FileIO


class Spout(FileIO):
    """A file or stream that turns into /dev/null when its reader has left; stderr does so whatever it can't take."""

    lost = False

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() != 2 and not isinstance(error, BrokenPipeError):  # a full disk loses an answer: exit 6
                raise
        self.lost = True
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.fileno())  # processes and libraries that write there by themselves outlive it, too
        os.close(nothing)
        return len(data)
