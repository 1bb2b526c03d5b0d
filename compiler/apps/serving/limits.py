"""Limits of a server for each client: bytes, connections and seconds."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds that hold before anything of a request is looked at.

    body         bytes of a request's body
    connections  open at once, those that say nothing included
    seconds      a client has for the headers of a request, and between two requests of one connection; four
                 times as long for a body, and to take what was sent to it
    """

    body: int = 4 * MIB
    connections: int = 256
    seconds: float = 15.0

    @property
    def max_connections_per_address(self) -> int:
        """Connections of one address of another machine."""
        return max(1, self.connections // 4)

    @property
    def body_timeout_s(self) -> float:
        """Seconds for a body, and for a piece of an answer that the client does not take."""
        return 4 * self.seconds

    @property
    def max_drained_bytes(self) -> int:
        """Bytes of a body too large that are read and thrown away, so that its sender hears why."""
        return 16 * self.body
