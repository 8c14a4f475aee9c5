"""Clients that do anything, at any moment, to the protocol's handler: `serving_world` says what
must be true all the while. `benchmarks/fuzz_serving.py` searches the same ground guided by coverage.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from serving_world import World

which = st.integers(0, 20)  # of the guests, of the sessions
codecs = st.sampled_from(["pcm", "pcm", "opus"])


class Clients(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def guest(self, number: int) -> Any:
        return self.world.guests[number % len(self.world.guests)]

    @rule(
        kind=st.sampled_from(["none", "new", "new", "known", "known", "known", "foreign", "other"]),
        codec=codecs,
        session=which,
        after=st.sampled_from([0.0, 0.0, 0.01, 1.0]),
    )
    def connect(self, kind: str, codec: str, session: int, after: float) -> None:
        self.world.connect(kind, codec, session, after)

    @precondition(lambda self: self.world.guests)
    @rule(number=which, frames=st.integers(1, 8) | st.just(60), cut=st.integers(0, 5000))
    def say(self, number: int, frames: int, cut: int) -> None:
        self.world.say(self.guest(number), frames, cut)

    @precondition(lambda self: self.world.guests)
    @rule(number=which, message=st.binary(max_size=40), sound=st.booleans(), times=st.just(1) | st.just(1100))
    def send_anything(self, number: int, message: bytes, sound: bool, times: int) -> None:
        for _ in range(times):
            self.world.send(self.guest(number), b"\x01" * sound + message)

    @precondition(lambda self: self.world.guests)
    @rule(number=which)
    def stop_reading(self, number: int) -> None:
        self.guest(number).peer.reads.clear()

    @precondition(lambda self: self.world.guests)
    @rule(number=which)
    def read_again(self, number: int) -> None:
        self.guest(number).peer.reads.set()

    @precondition(lambda self: self.world.guests)
    @rule(number=which, code=st.sampled_from([1000, 1001, 1005, 1006, 1009, 4000]))
    def close(self, number: int, code: int) -> None:
        self.guest(number).peer.put(code)

    @precondition(lambda self: self.world.guests)
    @rule(number=which)
    def vanish(self, number: int) -> None:
        self.guest(number).peer.vanish()

    @precondition(lambda self: self.world.guests)
    @rule(number=which)
    def cancel(self, number: int) -> None:
        self.guest(number).task.cancel()

    @rule(turns=st.integers(0, 4))
    def turn(self, turns: int) -> None:
        self.world.loop.turn(turns)

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.02, 0.1, 1.0, 4.0, 7.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.loop.pass_time(seconds)

    @rule(model=st.sampled_from([0.0, 0.02, 0.5]), disk=st.sampled_from([0.0, 0.01, 2.0]))
    def slow_down(self, model: float, disk: float) -> None:
        self.world.model.seconds, self.world.store.seconds = model, disk

    @rule(full=st.booleans(), broken=st.booleans())
    def disk(self, full: bool, broken: bool) -> None:
        self.world.disk.full, self.world.disk.broken = full, broken

    @rule()
    def settle(self) -> None:
        self.world.settle()

    @rule(chance=st.integers(0, 9))
    def end_of_the_server(self, chance: int) -> None:
        if chance == 0:
            self.world.fail()
        elif chance == 1:
            self.world.stop()

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.end()


TestClients = Clients.TestCase
TestClients.settings = settings(max_examples=60, stateful_step_count=40)
