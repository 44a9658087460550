"""A connection's transport that reads on after an answer which did not wait for the whole request.

Where a socket is closed with unread data, the system resets the connection, and the client may lose
the answer that was on its way. nginx calls the remedy `lingering_close`.
"""

import asyncio
from collections.abc import Callable
from typing import Any


class LingeringTransport(asyncio.Transport):
    """Closed while its client still sends, it ends the answer, and goes on to read until somebody
    aborts it or the client closes."""

    def __init__(self, transport: asyncio.Transport, is_sending: Callable[[], bool]) -> None:
        super().__init__()
        self._transport = transport
        self._is_sending = is_sending
        self.lingers = False

    def close(self) -> None:
        if self.is_closing():
            return
        if self._is_sending():
            self.linger()
        else:
            self._transport.close()

    def linger(self) -> None:
        """Tell the client that the answer has ended, and read what still comes."""
        if self.is_closing():
            return
        self.lingers = True
        # TLS has no such end: there the client counts the answer's bytes.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()

    def abort(self) -> None:
        self.lingers = False
        self._transport.abort()

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._transport.write(data)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
