"""The page for browsers: plain files at `/` and `/page/`, which load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

from aiohttp import web

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Websockets of the same host are 'self', too.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a browser asks whether its copy is still good
}


def add_page(router: web.UrlDispatcher) -> None:
    """Serve the page. It needs no token: it holds nothing but what everybody can install."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}
    index = files.pop("index.html")  # whose links start from `/`

    async def at_root(request: web.Request) -> web.Response:
        return _answer(request, ".html", index)

    async def beside(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in files:
            raise web.HTTPNotFound
        return _answer(request, Path(name).suffix, files[name])

    router.add_get("/", at_root)
    router.add_get("/page/{name}", beside)


def _answer(request: web.Request, suffix: str, body: bytes) -> web.Response:
    # The type is set here: a system's own table of types may call a module plain text, which
    # browsers do not run.
    response = web.Response(body=body, content_type=TYPES[suffix], charset="utf-8", headers=HEADERS)
    response.etag = tag = hashlib.sha256(body).hexdigest()[:32]
    if any(known.value == tag for known in request.if_none_match or ()):
        response.set_status(304)
        response.body = None
    return response
