"""Unpacks request bodies that are compressed with gzip."""

import zlib
from collections.abc import AsyncIterator

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infuse.server.errors import ApiError, error_response

_PIECE_BYTES = 1 << 16
"""Bytes that are unpacked at once, so that a small body never takes much memory."""
_GZIP = 16 + zlib.MAX_WBITS
"""zlib's window size for data with a gzip header and checksum."""


class GunzipBodies:
    """ASGI middleware that unpacks gzip bodies. `limit` is for the bytes of the packed body; the
    application within bounds the unpacked ones."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if encoding in ("identity", ""):
            await self._app(scope, receive, send)
            return
        if encoding not in ("gzip", "x-gzip"):
            message = f"Content-Encoding is {encoding[:40]!r}; send the body plain, or as gzip."
            refusal = ApiError(400, message, code="unknown_encoding", param="Content-Encoding")
            await error_response(refusal)(scope, receive, send)
            return
        packed = (b"content-encoding", b"content-length")
        headers = [each for each in scope["headers"] if each[0] not in packed]
        pieces = _unpacked(receive, self._limit)

        async def receive_plain() -> Message:
            # Messages after the body are passed on as they are.
            return await anext(pieces, None) or await receive()

        await self._app({**scope, "headers": headers}, receive_plain, send)


async def _unpacked(receive: Receive, limit: int) -> AsyncIterator[Message]:
    """The messages of a request whose body is gzip, with its bytes unpacked.

    Raises HTTPException 400 where it is no gzip or is cut, and 413.
    """
    unpacker = zlib.decompressobj(_GZIP)
    received, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            yield message
            return
        packed = message.get("body", b"")
        more = message.get("more_body", False)
        received += len(packed)
        if received > limit:
            raise HTTPException(413, f"The packed body is larger than {limit} bytes.")
        while packed:
            if unpacker.eof:
                # A gzip body may consist of several gzip files, one behind the other.
                unpacker = zlib.decompressobj(_GZIP)
            try:
                piece = unpacker.decompress(packed, _PIECE_BYTES)
            except zlib.error as error:
                raise HTTPException(400, f"{_NAMED}, but the body is not gzip: {error}") from error
            packed = unpacker.unconsumed_tail or unpacker.unused_data
            yield {"type": "http.request", "body": piece, "more_body": True}
        if not more and received and not unpacker.eof:
            raise HTTPException(400, f"{_NAMED}, but the body is cut short.")
    yield {"type": "http.request", "body": b"", "more_body": False}


_NAMED = "Content-Encoding is gzip"
