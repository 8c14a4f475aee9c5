"""Servers that share a folder of sessions: one alone goes on with each, whoever is asked or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch_files import FRAME, Checkpoint
from serving_support import (
    LENGTH,
    Models,
    closed,
    connected,
    run,
    served,
    until,
)

from ttt_cache.serving.sessions import Sessions, TakenError, UnknownError, new_name
from ttt_cache.session_file import read_session


@pytest.fixture(scope="module")
def others(small_moshi: Checkpoint) -> Models:
    """The model of another server."""
    return Models.of(small_moshi)


def saves(folder: Path) -> list[int]:
    """Frames of each session on disk."""
    files = folder.glob("[!.]*.safetensors")
    return [int(read_session(path)[0]["rows.gen.offsets"]) for path in files]


async def saved(models: Models, heard: Any, folder: Path) -> tuple[str, Any]:
    """A session of `LENGTH` frames on disk: its name and what it holds."""
    async with served(models, 1, folder) as server:
        async with connected(server.url()) as client:
            await client.say(heard[0])
            await client.hear(LENGTH - 1)
        await until(lambda: server.engine.free == 1)
    (path,) = folder.glob("[!.]*.safetensors")
    return client.session, read_session(path)


def test_a_server_that_was_believed_dead_ends_what_another_one_took_up(
    models, others, heard, tmp_path
) -> None:
    """Nobody asked it to let go: it finds out when it saves, and overwrites nothing."""

    async def test() -> None:
        async with (
            served(models, 1, tmp_path, save_every=0.3) as first,
            connected(first.url()) as old,
        ):
            await old.say(heard[0])
            await old.hear(LENGTH - 1)
            await until(lambda: saves(tmp_path) == [LENGTH])
            async with served(others, 1, tmp_path, save_every=1000) as second:
                async with connected(second.url(f"/api/chat?session={old.session}")) as new:
                    await old.say(heard[0][:FRAME])  # there is something to save
                    assert await closed(old) == 4001
                    await new.say(heard[0])
                    await new.hear(LENGTH - 1)
                await until(lambda: second.engine.free == 1)
        assert saves(tmp_path) == [2 * LENGTH], "of the second, not of the first"

    run(test())


def test_one_alone_gets_a_session(models, heard, tmp_path) -> None:
    async def test() -> None:
        name, session = await saved(models, heard, tmp_path)
        before, after = Sessions(tmp_path, 100), Sessions(tmp_path, 100)
        old = before.path(name)
        path, _ = after.take(name)
        assert path != old and path.exists() and not old.exists()
        with pytest.raises(TakenError):
            before.write(old, session)
        assert not old.exists()
        newer, _ = before.take(name)
        with pytest.raises(TakenError):
            after.write(path, session)
        before.write(newer, session)
        # One that looked before the other took it: the place that it wants is taken.
        after._taken = lambda hashed: [1]  # type: ignore[method-assign]
        (tmp_path / path.name).write_bytes(newer.read_bytes())
        with pytest.raises(TakenError):
            after.take(name)
        # What a server left that wrote late is older, and goes when the session is taken up.
        del after._taken
        assert after.take(name)[0] != newer and not path.exists()
        with pytest.raises(UnknownError):
            after.take(new_name())

    run(test())


def test_a_damaged_session_stays_where_it_was(tmp_path) -> None:
    store, name = Sessions(tmp_path, 100), new_name()
    store.path(name).write_bytes(b"damaged")
    with pytest.raises(ValueError):
        store.take(name)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"damaged"]
