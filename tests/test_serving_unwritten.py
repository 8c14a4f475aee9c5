"""A session that the disk did not take and that was not gone on with: neither lost nor old."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving_world import ROWS, World

from ttt_cache.serving.metrics import Metrics
from ttt_cache.serving.saving import Saving
from ttt_cache.serving.sessions import Sessions, key, new_name

HEARD = 3  # frames


@pytest.fixture
def world() -> Iterator[World]:
    """One conversation of `HEARD` frames of which the disk, which is full, has nothing."""
    made = World()
    made.connect("new", "pcm")
    made.loop.pass_time(0.1)
    made.disk.full = True
    made.say(made.guests[0], HEARD)
    made.loop.pass_time(1)
    yield made
    made.end()


def name_of(world: World) -> str:
    (conversation,) = (guest.conversation for guest in world.guests if guest.conversation)
    return conversation.name


def taken_over_in_vain(world: World) -> str:
    world.engine.refuses = True
    world.connect("known", "pcm")
    world.loop.pass_time(0.5)
    assert world.guests[-1].refused == 409
    world.engine.refuses = False
    return name_of(world)


def comes_back(world: World, seconds: float) -> None:
    """Within so many seconds somebody goes on with all that was heard, from a disk that is full."""
    world.connect("known", "pcm")
    world.loop.pass_time(seconds)
    assert world.guests[-1].refused is None and len(world.guests[-1].base) == HEARD
    world.disk.full = False


def test_it_is_written_once_there_is_room(world: World) -> None:
    name = taken_over_in_vain(world)
    world.disk.full = False
    world.loop.pass_time(2.5)
    assert len(world.disk.kept[name] or []) == HEARD and not world.host._saving._unwritten


def test_who_comes_again_before_that_gets_it(world: World) -> None:
    taken_over_in_vain(world)
    comes_back(world, 0.1)
    world.settle()


def test_it_is_written_when_the_server_stops(world: World) -> None:
    """The takeover is on its way, and is refused by that."""
    world.model.seconds = 0.3
    world.connect("known", "pcm")
    world.loop.pass_time(0.4)  # the first one has left, the disk was full
    world.disk.full = False
    world.stop()
    world.loop.pass_time(2)
    assert world.guests[-1].refused == 503 and world.stopping.done()
    assert len(world.disk.kept[name_of(world)] or []) == HEARD


def session_of(frames: int) -> Any:
    described = {"identity": {}, "conversations": 1, "whole_batch": False}
    return {"frames": torch.tensor([frames])}, described


def frames_of(session: Any) -> int:
    return int(session[0]["frames"])


def unwritten(saving: Saving, name: str, path: Path, frames: int, monkeypatch: Any) -> None:
    """A session whose last state the disk did not take when it was taken over."""

    def full(*_: object) -> None:
        raise OSError("no space left")

    conversation: Any = SimpleNamespace(name=name, path=path, changed=False)
    with monkeypatch.context() as patched:
        patched.setattr(saving._sessions, "write", full)
        asyncio.run(saving.write(conversation, session_of(frames), last=True))


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Sessions, Sessions]:
    """Of two servers that share a folder."""
    return Sessions(tmp_path, 3600), Sessions(tmp_path, 3600)


@pytest.mark.parametrize("retried", [False, True])
def test_what_another_server_went_on_with_is_not_undone(stores, retried, monkeypatch) -> None:
    ours, theirs = stores
    saving, name = Saving(ours, Metrics(1, 0), 30.0, 1), new_name()
    path = ours.first(name)
    ours.write(path, session_of(1))
    unwritten(saving, name, path, 2, monkeypatch)
    elsewhere, session = theirs.take(name)
    assert frames_of(session) == 1
    theirs.write(elsewhere, session_of(5))

    async def test() -> None:
        if retried:
            await saving.write_left()
        taken, session = await saving.take(name)
        assert frames_of(session) == 5 and taken not in (path, elsewhere)

    asyncio.run(test())
    assert not saving._unwritten


def test_a_disk_that_is_full_no_more_has_it_before_it_is_taken_up(stores, monkeypatch) -> None:
    saving, name = Saving(stores[0], Metrics(1, 0), 30.0, 1), new_name()
    unwritten(saving, name, stores[0].first(name), 2, monkeypatch)
    _, session = asyncio.run(saving.take(name))
    assert frames_of(session) == 2 and not saving._unwritten
    assert frames_of(stores[1].take(name)[1]) == 2


def leaves(world: World) -> None:
    """The connection of the last one breaks, and the disk is slow."""
    world.store.seconds = 1.0
    world.guests[-1].peer.vanish()
    world.loop.pass_time(0.1)


def test_who_comes_while_it_leaves_gets_it(world: World) -> None:
    leaves(world)
    comes_back(world, 5)


def test_who_comes_after_it_left_gets_it(world: World) -> None:
    leaves(world)
    world.loop.pass_time(5)
    assert not world.host._seats.here
    comes_back(world, 5)


def test_what_another_server_asked_for_is_not_lost(world: World) -> None:
    name = name_of(world)
    world.loop.run_until_complete(world.host.let_go(key(name)))
    assert not world.host._seats.here and name not in world.disk.kept
    world.disk.full = False
    world.loop.pass_time(2.5)
    assert len(world.disk.kept[name] or []) == HEARD


def test_a_save_that_fails_while_its_client_leaves(world: World) -> None:
    """It was under way, and nothing was said since."""
    world.store.seconds = 1.0
    world.loop.pass_time(2.5)
    assert world.store._busy
    leaves(world)
    world.loop.pass_time(5)
    world.disk.full = False
    world.loop.pass_time(5)
    assert len(world.disk.kept[name_of(world)] or []) == HEARD


def test_of_too_many_the_newest_are_held(world: World, caplog) -> None:
    names = [name_of(world)]
    leaves(world)
    for number in range(ROWS):
        world.connect("new", "pcm")
        world.loop.pass_time(0.1)
        world.say(world.guests[-1], HEARD)
        world.loop.pass_time(1)
        names.append(world.names[-1])
        leaves(world)
        world.loop.pass_time(8)
        assert ("has lost its end" in caplog.text) == (number == ROWS - 1)
    world.disk.full = False
    world.settle()
    world.loop.pass_time(2)
    assert [name in world.disk.kept for name in names] == [False, *[True] * ROWS]


def test_who_comes_and_goes_faster_than_the_disk_finds_no_seat(world: World) -> None:
    world.disk.full, world.store.seconds = False, 1.0
    for _ in range(10 * ROWS):
        world.connect("new", "pcm")
        world.loop.pass_time(0.05)
        world.say(world.guests[-1], 1)
        world.loop.pass_time(0.05)
        world.guests[-1].peer.vanish()
        world.loop.pass_time(0.005)
        world.check()
    assert not world.host.free and world.engine.free, "rows are there, but not the memory"
    assert world.guests[-1].refused == 503
    world.connect("known", "pcm", 2 * ROWS)  # who comes back has a seat, and waits for the disk
    world.loop.pass_time(10)
    assert world.guests[-1].refused is None
    world.settle()


def test_the_gauge_goes_on_while_the_disk_hangs(world: World) -> None:
    world.store.seconds = 200.0
    world.loop.pass_time(60)
    value = world.host.metrics.registry.get_sample_value("ttt_cache_unsaved_seconds")
    assert value is not None and value > 60
    world.store.seconds = 0.01
    world.loop.pass_time(200)
