"""`ttt-cache bench serve`: what it refuses, and says of itself."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from bench_serve_support import call, listening
from serving_support import connected, run, served
from typer.testing import CliRunner

from ttt_cache.cli import main


def _says(*said: bytes) -> Any:
    """A server that greets with these and closes."""

    async def chat(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for message in said:
            await socket.send_bytes(message)
        await socket.close()
        return socket

    return chat


def _floods(greeting: bytes, cut_off: list[bool]) -> Any:
    """A server that talks for 20 s, even while its client leaves; notes whether that one went."""

    async def chat(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_bytes(greeting)
        try:
            for _ in range(2000):
                await socket.send_bytes(b"\x01OggSgarbage")
                await asyncio.sleep(0.01)
            cut_off.append(False)
        except ConnectionError:
            cut_off.append(True)
        return socket

    return chat


@pytest.mark.parametrize(
    ("greeting", "says"),
    [(b"\x00", "ended: an answer is not an Ogg/Opus stream"), (b"\x07", "first message is not 0")],
)
def test_servers_that_never_stop_talking(greeting, says, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ttt_cache.bench.serve.client.LEAVE_S", 0.5)
    cut_off: list[bool] = []

    async def test() -> None:
        async with listening(_floods(greeting, cut_off)) as url:
            result = await asyncio.to_thread(call, "--url", url, "--out", tmp_path / "out")
            assert result.exit_code == 2 and says in result.stderr, result.output
            assert "Traceback" not in result.output
            while not cut_off:
                await asyncio.sleep(0.05)
            assert cut_off == [True]

    run(test())


def test_servers_that_take_no_one_in(models, tmp_path) -> None:
    async def says(*words: object) -> str:
        result = await asyncio.to_thread(call, *words, "--out", tmp_path / "out")
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        assert not (tmp_path / "out").exists()
        return result.stderr

    async def test() -> None:
        said = await says("--url", "ws://localhost:9")
        assert "nothing listens there. 'ttt-cache serve' starts" in said
        async with served(models, 1, token="right") as server:
            url = f"ws://localhost:{server.port}"
            assert "--token or TTT_CACHE_TOKEN (HTTP 401)" in await says("--url", url)
            headers = {"Authorization": "Bearer right"}
            async with connected(server.url(), headers=headers):
                assert "it is full" in await says("--url", url, "--token", "right")
            assert "no /api/chat (HTTP 404)" in await says("--url", url + "/else")
        async with listening(_says(b"\x07")) as url:
            assert "does not speak Moshi's protocol" in await says("--url", url)
        async with listening(_says(b"\x00", b"\x01no Ogg" * 99)) as url:
            assert "ended: an answer is not an Ogg/Opus stream" in await says("--url", url)
        garbage = await asyncio.start_server(_garbage, "localhost", 0)
        port = garbage.sockets[0].getsockname()[1]
        assert "does not speak HTTP" in await says("--url", f"ws://localhost:{port}")
        garbage.close()

    run(test())


async def _garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-none\r\n\r\n")
    writer.close()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--url", "localhost:8998"], "--url must be an address such as ws://localhost:8998, got"),
        (["--url", "ftp://localhost"], "--url must be an address such as ws://localhost:8998, got"),
        (["--url", "ws://host:port"], "--url must be an address such as ws://localhost:8998, got"),
        (["--url", "ws://me:a@host", "--token", "b"], "--token and a password in --url exclude"),
        (["--token", "é"], "--token must be printable ASCII"),
        (["--clients", "0"], "--clients must be at least 1, got 0"),
        (["--clients", "many"], "must be a whole number, got 'many'"),
        (["--seconds", "0"], "--seconds must be a number of at least 1, got 0"),
        (["--warm-up", "-1"], "--warm-up must be a number of at least 0, got -1"),
        (["--codec", "mp3"], "--codec must be one of opus, pcm, got 'mp3'"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
)
def test_what_is_refused(words: list[str], says: str, tmp_path: Path) -> None:
    result = call(*words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and says in re.sub(r"\s+", " ", result.stderr), result.output
    assert not (tmp_path / "out").exists()


def test_options_do_not_go_before_the_subcommand() -> None:
    result = CliRunner().invoke(main, ["bench", "--batch", "2", "serve"])
    assert result.exit_code == 2 and "--batch is no option of 'bench serve'" in result.stderr


def test_help_of_both_commands() -> None:
    bench = CliRunner().invoke(main, ["bench", "--help"], env={"COLUMNS": "200"})
    assert "Example: ttt-cache bench --batch 1" in bench.stdout
    assert "ttt-cache bench serve --help" in bench.stdout and "--repetitions" in bench.stdout
    text = call("--help").stdout
    for option in ("url", "token", "clients", "seconds", "warm-up", "codec", "seed", "out"):
        assert f"--{option} " in text
    assert "Example: ttt-cache bench serve" in text and "on your own servers only" in text
