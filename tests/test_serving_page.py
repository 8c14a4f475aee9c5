"""The page for browsers as files: what is served, with which headers, and that it stays at home."""

from __future__ import annotations

import re

import aiohttp
import pytest
from serving_support import refused, run, served

from ttt_cache.serving.page import FOLDER, TYPES

FILES = sorted(path for path in FOLDER.iterdir() if path.name != "index.html")
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
INDEX = (FOLDER / "index.html").read_text()


def test_the_page_is_served_to_everybody_with_strict_headers(models) -> None:
    """It asks for the token; it does not need it."""

    async def test() -> None:
        async with (
            served(models, 1, token="s3cret") as server,
            aiohttp.ClientSession() as session,
        ):
            for at, path in [("/", FOLDER / "index.html")] + [
                (f"/page/{path.name}", path) for path in FILES
            ]:
                async with session.get(server.url(at)) as response:
                    assert response.status == 200 and await response.read() == path.read_bytes()
                    assert response.content_type == TYPES[path.suffix]
                    assert response.charset == "utf-8"
                    policy = response.headers["Content-Security-Policy"]
                    assert "default-src 'self';" in policy and "unsafe" not in policy
                    assert "frame-ancestors 'none'" in policy
                    assert response.headers["X-Content-Type-Options"] == "nosniff"
                    assert response.headers["Cache-Control"] == "no-cache"
                    known = {"If-None-Match": response.headers["ETag"]}
                async with session.get(server.url(at), headers=known) as response:
                    assert response.status == 304 and await response.read() == b""
                async with session.get(server.url(at), headers={"If-None-Match": '"x"'}) as again:
                    assert again.status == 200
                async with session.head(server.url(at)) as response:
                    assert response.status == 200
                async with session.post(server.url(at)) as response:
                    assert response.status == 405
            assert (await refused(server.url("/api/chat?codec=pcm&session=new")))[0] == 401
            assert (await refused(server.url("/metrics")))[0] == 401

    run(test())


@pytest.mark.parametrize(
    "path", ["index.html", "nothing.js", "..%2fpage.py", "%2e%2e/page.py", "../page.py", "", "%00"]
)
def test_nothing_else_is_served(path, models) -> None:
    async def test() -> None:
        async with served(models, 1) as server, aiohttp.ClientSession() as session:
            url = aiohttp.client.URL(server.url("/page/") + path, encoded=True)
            async with session.get(url) as response:
                assert response.status == 404

    run(test())


def test_the_files_load_each_other_and_nothing_from_elsewhere() -> None:
    for path in (FOLDER / "index.html", *FILES):
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.search(r"https?://|[\"'(]//\w|@import|\burl\(", text), path
        assert not re.search(r"\son\w+=|<style|style=|\beval\b|innerHTML", text), path
    linked = set(re.findall(r'(?:href|src)="page/([^"]+)"', INDEX))
    assert linked and len(re.findall(r"(?:href|src)=", INDEX)) == len(linked)
    for path in SCRIPTS:
        text = path.read_text()
        named = re.findall(r'(?:from|import) "([^"]+)"', text)
        assert all(name.startswith("./") for name in named), path
        linked |= {name[2:] for name in named} | set(re.findall(r'"([\w-]+-worklet\.js)"', text))
    assert linked == {path.name for path in FILES}, "each is loaded by another one, and is there"
