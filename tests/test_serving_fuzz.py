"""Clients that do anything, at any moment, to the protocol's handler.

`serving_world` says what must be true all the while; `benchmarks/fuzz_serving.py` searches the same
ground guided by coverage.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from serving_world import ROWS, Guest, World

from ttt_cache.serving.errors import GOING_AWAY, TAKEN_OVER
from ttt_cache.serving.talk import MOST_PASSED


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    for _ in range(ROWS):
        made.connect("new", "pcm")
        made.loop.pass_time(0.1)
    yield made
    made.end()


def test_who_takes_over_gets_the_row_where_others_wait_for_one(world: World) -> None:
    for kind in ("none", "known", "none", "new"):  # the first conversation is taken over
        world.connect(kind, "pcm")
    world.loop.pass_time(0.1)
    assert [guest.refused for guest in world.guests[ROWS:]] == [503, None, 503, 503]
    first, taker = world.guests[0], world.guests[ROWS + 1]
    assert first.peer.code == TAKEN_OVER and first.conversation is not None
    assert taker.conversation is not None, "though no frame of it was ever saved"
    assert taker.conversation.name == first.conversation.name


def test_the_servers_end_counts_before_the_clients(world: World) -> None:
    guest = world.guests[0]
    assert guest.conversation is not None
    guest.conversation.end(TAKEN_OVER, "elsewhere")
    guest.peer.put(b"\x01odd")
    world.loop.pass_time(0.1)
    assert guest.peer.code == TAKEN_OVER


def test_who_was_on_the_way_in_when_the_server_stopped_is_turned_away(world: World) -> None:
    for guest in world.guests:
        guest.peer.vanish()
    world.settle()
    world.connect("new", "pcm")
    world.loop.turn(2)
    world.stop()
    world.loop.pass_time(1)
    assert world.guests[-1].refused == 503


def test_what_came_before_the_servers_end_is_heard_and_saved(world: World) -> None:
    guest = world.guests[0]
    world.model.seconds = 0.1
    world.say(guest, 5)
    world.loop.pass_time(0.05)  # the first is being stepped
    world.stop()
    world.loop.pass_time(2)
    assert guest.conversation is not None and guest.peer.code == GOING_AWAY
    assert len(world.disk.kept[guest.conversation.name] or []) == 5


def test_what_could_not_be_saved_is_tried_again(world: World) -> None:
    world.disk.full = True
    world.say(world.guests[0], 3)
    world.loop.pass_time(3)
    assert world.disk.behind
    world.disk.full = False
    world.loop.pass_time(2.5)
    assert not world.disk.behind


def test_who_leaves_while_it_is_saved_has_left_when_it_is_saved(world: World) -> None:
    """`Neighbours.left` looks at the disk, which is slow."""
    guest = world.guests[0]
    world.say(guest, 5)
    world.loop.pass_time(1)
    world.store.seconds = 1.0
    world.loop.pass_time(1)  # its save is on its way
    guest.peer.vanish()
    world.loop.pass_time(0.1)
    assert guest.conversation is not None
    name = guest.conversation.name
    assert (
        name in world.engine.left and name in world.host._seats.here and name not in world.disk.kept
    )
    world.loop.pass_time(3)
    assert name not in world.host._seats.here and world.disk.kept[name] == world.engine.left[name]


def test_half_a_step_is_saved_over_nothing(world: World) -> None:
    guest = world.guests[0]
    world.say(guest, 3)
    world.settle()
    assert guest.conversation is not None
    name = guest.conversation.name
    kept = list(world.disk.kept[name] or [])
    assert len(kept) == 3
    world.engine.fails, world.model.seconds = True, 0.5
    world.say(guest, 1)
    world.loop.pass_time(0.1)
    guest.peer.vanish()
    world.loop.pass_time(5)
    assert world.disk.kept[name] == kept


def test_who_takes_over_loses_nothing_while_the_disk_is_full(world: World) -> None:
    """`World` compares what the row knows with what it knew."""
    world.disk.full = True
    world.say(world.guests[0], 3)
    world.loop.pass_time(3)
    world.connect("known", "pcm")
    world.loop.pass_time(0.1)
    taker = world.guests[-1]
    assert taker.refused is None and len(taker.base) == 3
    world.disk.full = False
    world.loop.pass_time(2.5)
    assert not world.disk.behind


which = st.integers(0, 20)  # of the guests, of the sessions
kinds = st.sampled_from(["none", *["new"] * 3, *["known"] * 4, "foreign", "unknown", "no name"])
codecs = st.sampled_from(["pcm", "pcm", "pcm", "opus"])
frames = st.integers(1, 8) | st.just(60)
codes = st.sampled_from([1000, 1001, 1005, 1006, 1009, 4000])
some = precondition(lambda self: self.world.here)


class Clients(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def guest(self, number: int) -> Guest:
        return self.world.here[number % len(self.world.here)]

    @initialize(frames=frames)
    def two_talk(self, frames: int) -> None:
        self.comes_and_talks("new", "pcm", 0, frames)
        self.comes_and_talks("new", "pcm", 0, 3)

    @rule(kind=kinds, codec=codecs, session=which, after=st.sampled_from([0.0, 0.01, 1.0]))
    def comes(self, kind: str, codec: str, session: int, after: float) -> None:
        self.world.connect(kind, codec, session, after)

    @rule(kind=kinds, codec=codecs, session=which, frames=frames)
    def comes_and_talks(self, kind: str, codec: str, session: int, frames: int) -> None:
        self.world.connect(kind, codec, session)
        self.world.say(self.world.guests[-1], frames)
        self.world.loop.pass_time(0.1)

    @some
    @rule(number=which, frames=frames, cut=st.integers(0, 5000))
    def talks(self, number: int, frames: int, cut: int) -> None:
        self.world.say(self.guest(number), frames, cut)

    @some
    @rule(number=which, message=st.binary(max_size=40), sound=st.booleans(), many=st.booleans())
    def sends_anything(self, number: int, message: bytes, sound: bool, many: bool) -> None:
        for _ in range(MOST_PASSED + 100 if many else 1):
            self.world.send(self.guest(number), b"\x01" * sound + message)

    @some
    @rule(number=which, reads=st.booleans())
    def reads(self, number: int, reads: bool) -> None:
        event = self.guest(number).peer.reads
        event.set() if reads else event.clear()

    @some
    @rule(number=which, code=codes)
    def closes(self, number: int, code: int) -> None:
        self.guest(number).peer.put(code)

    @some
    @rule(number=which)
    def vanishes(self, number: int) -> None:
        self.guest(number).peer.vanish()

    @some
    @rule(number=which)
    def is_cancelled(self, number: int) -> None:
        self.guest(number).task.cancel()

    @rule(turns=st.integers(0, 4))
    def turns(self, turns: int) -> None:
        self.world.loop.turn(turns)

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.02, 0.1, 1.0, 4.0, 7.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.loop.pass_time(seconds)

    @rule(
        model=st.sampled_from([0.02, 0.0, 0.5]),
        disk=st.sampled_from([0.01, 0.0, 2.0]),
        full=st.booleans(),
        broken=st.booleans(),
        refuses=st.booleans(),
    )
    def is_in_trouble(
        self, model: float, disk: float, full: bool, broken: bool, refuses: bool
    ) -> None:
        self.world.model.seconds, self.world.store.seconds = model, disk
        self.world.disk.full, self.world.disk.broken = full, broken
        self.world.engine.refuses = refuses

    @rule()
    def settles(self) -> None:
        self.world.settle()

    @rule()
    def falls_silent(self) -> None:
        self.world.fall_silent()

    @rule(chance=st.integers(0, 19))
    def ends(self, chance: int) -> None:
        if chance == 18:
            self.world.stop()
        elif chance == 19:
            self.world.engine.fails = True

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.end()


TestClients = Clients.TestCase
TestClients.settings = settings(max_examples=150, stateful_step_count=40)
