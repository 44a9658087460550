"""The console: the built files of `server/console/`, which need no key. What they ask for does."""

from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, Request, Response

from infuse.server.errors import nothing_at

router = APIRouter(include_in_schema=False)

_PAGE = "index.html"
_KINDS = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere is loaded or asked, and no other site shows the page within its own.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
# Read once, while the server starts: no slow disk holds an answer up.
_FILES = {
    file.name: file.read_bytes()
    for file in files("infuse.server").joinpath("console").iterdir()
    if PurePath(file.name).suffix in _KINDS
}


@router.get("/")
async def show_page() -> Response:
    return _answer(_PAGE)


@router.get("/console/{file}")
async def show_file(file: str, request: Request) -> Response:
    if file not in _FILES:
        raise nothing_at(request.method, request.url.path)
    return _answer(file)


def _answer(file: str) -> Response:
    return Response(_FILES[file], media_type=_KINDS[PurePath(file).suffix], headers=_HEADERS)
