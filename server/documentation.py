"""The pages that show the OpenAPI document, from files of a package: they need no internet."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

_PACKAGE = "fastapi_offline"
_Name = Literal["swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png"]


def add_pages(app: FastAPI, root_path: str) -> None:
    """Add /docs and /redoc. `root_path`: where a browser finds the server's root."""
    document, below = f"{root_path}{app.openapi_url}", f"{root_path}/docs/files"

    @app.get("/docs", include_in_schema=False)
    async def swagger() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=document,
            title=app.title,
            swagger_js_url=f"{below}/swagger-ui-bundle.js",
            swagger_css_url=f"{below}/swagger-ui.css",
            swagger_favicon_url=f"{below}/favicon.png",
        )

    @app.get("/redoc", include_in_schema=False)
    async def redoc() -> HTMLResponse:
        return get_redoc_html(
            openapi_url=document,
            title=app.title,
            redoc_js_url=f"{below}/redoc.standalone.js",
            redoc_favicon_url=f"{below}/favicon.png",
            with_google_fonts=False,
        )

    @app.get("/docs/files/{name}", include_in_schema=False)
    async def file(name: _Name) -> FileResponse:
        return FileResponse(Path(str(files(_PACKAGE) / "static" / name)))
