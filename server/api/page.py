"""The chat page, which `hatch_build.py` builds from `web/`: files that load and run nothing from elsewhere."""

from __future__ import annotations

import mimetypes
from importlib.resources import files
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from anynode.server.errors import NotFound
from anynode.server.transport.http import refusal

DIRECTORY: Final = Path(str(files("anynode.server").joinpath("page")))
_MISSING: Final = "The chat page has not been built. Build it with: uv sync --inexact --reinstall-package anynode"
_SAFE: Final = {"Referrer-Policy": "no-referrer"}  # beside the `nosniff` of every answer
_PAGE: Final = {
    **_SAFE,
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cache-Control": "no-cache",
}
# Their names change with what they hold.
_ASSET: Final = {**_SAFE, "Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
_DEV: Final = '<meta name="anynode-dev" content="true"></head>'  # that there is a menu of what `anynode dev` may do


def page_routes(*, is_dev: bool = False, directory: Path = DIRECTORY) -> list[Route]:
    """Return the routes of the page at `/` and its files, or of a hint where the page has not been built."""

    async def page(request: Request) -> Response:
        try:
            html = (directory / "index.html").read_text()
        except FileNotFoundError:
            return PlainTextResponse(missing(directory) or _MISSING, 503, headers=_SAFE)
        return Response(html.replace("</head>", _DEV, 1) if is_dev else html, media_type="text/html", headers=_PAGE)

    async def asset(request: Request) -> Response:
        name: str = request.path_params["name"]
        built = _built(directory)
        if name.startswith(".") or name.endswith(".gz") or name not in built:
            return refusal(NotFound("There is no such file."))
        file = directory / "assets" / name
        headers = _ASSET
        if "gzip" in request.headers.get("accept-encoding", "") and f"{name}.gz" in built:
            file, headers = file.with_name(f"{name}.gz"), {**_ASSET, "Content-Encoding": "gzip"}
        media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return FileResponse(file, media_type=media_type, headers=headers)

    return [Route("/", page), Route("/assets/{name}", asset)]


def missing(directory: Path = DIRECTORY) -> str | None:
    """Return why the page is missing or older than its sources, None where it is up to date."""
    try:
        return (directory / "NOT_BUILT").read_text()
    except FileNotFoundError:
        return None if (directory / "index.html").exists() else _MISSING


def _built(directory: Path) -> set[str]:
    """Return the names of the files that the page loads. The disk is never asked for a name that a client made up."""
    return {path.name for path in directory.glob("assets/*")}
