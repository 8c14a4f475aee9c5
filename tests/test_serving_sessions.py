"""Conversations that outlive their connection, and what a server does with those on disk."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from launch_files import FRAME
from serving_support import LENGTH, closed, connected, refused, run, served, until

from ttt_cache.serving import run as serving_run
from ttt_cache.serving.listen import bound
from ttt_cache.serving.run import Options, Server
from ttt_cache.serving.sessions import Sessions, UnknownError, new_name

DELAY = 1  # frames before the first answer


def test_a_session_goes_on_where_it_was(models, heard, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 2, tmp_path / "s") as server:
            async with connected(server.url("/api/chat?session=new")) as client:
                name = client.session
                await client.say(heard[0])
                await client.hear(LENGTH - DELAY)
            await until(lambda: not server.host._seats.here)
            assert len(list((tmp_path / "s").glob("[!.]*.safetensors"))) == 1
            assert not [path for path in (tmp_path / "s").iterdir() if name in path.name]
            async with connected(server.url(f"/api/chat?session={name}")) as client:
                assert client.session == name
                row = next(iter(server.clock.conversations))
                assert server.engine.age(row) == LENGTH
                await client.say(heard[0])
                await client.hear(LENGTH)  # no delay: it has something to say at once
                await client.hear_for(0.05)
                assert client.session == name, "said after the handshake, too"

    run(test())


def test_who_comes_back_takes_over_from_a_dead_connection(models, heard, tmp_path) -> None:
    async def test() -> None:
        async with (
            served(models, 1, tmp_path) as server,
            connected(server.url("/api/chat?session=new")) as first,
        ):
            await first.say(heard[0])
            await first.hear(LENGTH - DELAY)
            ending = asyncio.ensure_future(closed(first))
            async with connected(server.url(f"/api/chat?session={first.session}")) as second:
                assert second.session == first.session
                assert server.engine.age(0) == LENGTH
                assert await ending == 4001

    run(test())


@pytest.mark.parametrize(
    ("query", "status", "reason"),
    [
        ("?session=" + "a" * 32, 404, "no such session"),
        ("?session=../../etc/passwd", 404, "no such session"),
        ("?session=" + "%2e%2e%2f" * 3, 404, "no such session"),
        ("?session=%00", 404, "no such session"),
        ("?session=", 404, "no such session"),
    ],
)
def test_unknown_sessions_are_refused(query, status, reason, models, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 1, tmp_path) as server:
            assert await refused(server.url("/api/chat" + query)) == (status, reason)
            assert server.engine.free == 1

    run(test())


def test_a_session_of_another_model_and_a_damaged_one(models, heard, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 1, tmp_path) as server:
            async with connected(server.url()) as client:
                await client.say(heard[0][: 3 * FRAME])
                await client.hear(2)
            await until(lambda: not server.host._seats.here)
            (file,) = tmp_path.glob("[!.]*.safetensors")
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            url = server.url(f"/api/chat?session={client.session}")
            assert await refused(url) == (409, "the session is not of this model")
            file.write_bytes(whole)
            assert server.engine.free == 1
        parameter = next(models.batched[0].parameters())
        parameter.data.add_(1)
        try:
            async with served(models, 1, tmp_path) as server:
                url = server.url(f"/api/chat?session={client.session}")
                assert await refused(url) == (409, "the session is not of this model")
                assert server.engine.free == 1
        finally:
            parameter.data.sub_(1)

    run(test())


@pytest.mark.parametrize("stops", [False, True])
def test_a_model_that_fails_ends_the_server_and_leaves_what_was_saved(
    stops, models, heard, tmp_path, monkeypatch
) -> None:
    """Though the server was told to stop during the step that fails."""
    said: list[str] = []
    monkeypatch.setattr(serving_run, "say", said.append)
    failing, goes_on, told = threading.Event(), threading.Event(), asyncio.Event()
    store = Sessions(tmp_path, 3600)
    engine, sockets = models.engine(2), bound("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/api/chat"
    thread = ThreadPoolExecutor(1)
    options = Options(2, save_every=0.2)
    server = Server(options, thread, engine, models.piece, store, sockets, None)

    def fails(frames: Any) -> None:
        failing.set()
        goes_on.wait(10)
        raise RuntimeError("the device is lost")

    async def stopped(_: Any) -> None:
        await told.wait()

    async def test() -> None:
        serving = asyncio.ensure_future(server.serve(stopped))
        await until(lambda: sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        async with connected(url) as client:
            await client.say(heard[0])
            await client.hear(LENGTH - DELAY)
            await until(lambda: list(tmp_path.glob("[!.]*.safetensors")))
            (file,) = tmp_path.glob("[!.]*.safetensors")
            await asyncio.sleep(0.5)
            before = file.read_bytes()
            engine._step = fails  # type: ignore[method-assign]
            await client.say(heard[0][:FRAME])
            await until(failing.is_set)
            if stops:
                told.set()
                await until(lambda: said[-1].startswith("stopping"))
            goes_on.set()
            assert await closed(client) == 1011
        with pytest.raises(RuntimeError, match="the device is lost"):
            await serving
        assert file.read_bytes() == before

    run(test())
    thread.shutdown()


def test_sessions_that_nobody_came_back_to_are_deleted(tmp_path) -> None:
    store = Sessions(tmp_path / "s", keep=100)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    names = [new_name() for _ in range(3)]
    for age, name in zip((0, 90, 110), names, strict=True):
        path = store.path(name)
        path.write_bytes(b"")
        os.utime(path, (time.time() - age, time.time() - age))
    others = [tmp_path / "s" / name for name in ("other", "model.safetensors", "1.safetensors")]
    half = tmp_path / "s" / ".abc_12de.safetensors"  # as mkstemp calls it
    for path in (*others, half):
        path.write_bytes(b"")
        os.utime(path, (0, 0))
    assert store.expire() == 2 and not half.exists()
    assert [store.path(name).exists() for name in names] == [True, True, False]
    assert all(path.exists() for path in others), "an operator's own files"
    with pytest.raises(UnknownError):
        store.take(names[2])
    assert len({*names, *(new_name() for _ in range(1000))}) == 1003


def test_who_came_back_is_kept_though_it_only_listens(tmp_path) -> None:
    store, name = Sessions(tmp_path, keep=100), new_name()
    path = store.first(name)
    store.write(path, ({}, {"identity": {}, "conversations": 1, "whole_batch": False}))
    os.utime(path, (time.time() - 90, time.time() - 90))
    taken, _ = store.take(name)
    assert taken.stat().st_mtime > time.time() - 50
    assert store.expire() == 0 and store.path(name) == taken


def test_a_folder_without_hard_links_is_refused(tmp_path, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    Sessions(tmp_path, 3600)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "link", fails)
    message = re.escape(f"--sessions must be on a file system with hard links, got {tmp_path}")
    with pytest.raises(ValueError, match=message):
        Sessions(tmp_path, 3600)
    assert not list(tmp_path.iterdir())
