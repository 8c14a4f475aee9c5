"""Which replica has which conversation: the registry is told late, twice, or never."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_time import Turns

pytest.importorskip("ray")
from registry_wire import Handle
from registry_world import Cluster

from ttt_cache.serving.cluster.registry import Registry
from ttt_cache.serving.sessions import key


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """In made-up time."""
    with asyncio.Runner(loop_factory=Turns) as runner:
        runner.run(coroutine)


async def known(registry: Registry, *names: str) -> dict[str, Handle]:
    """Replicas that have asked once, and do not ask again by themselves."""
    handles = {name: Handle() for name in names}
    asking = [registry.asked(name, handle, {}, 0) for name, handle in handles.items()]
    assert await asyncio.gather(*asking) == [None] * len(names)
    return handles


def test_whoever_has_a_session_is_asked_for_it() -> None:
    async def test() -> None:
        registry, handles = Registry(), {name: Handle() for name in "abc"}
        asked = {
            name: asyncio.ensure_future(
                registry.asked(name, handle, {"kept": 1} if name == "a" else {}, 1)
            )
            for name, handle in handles.items()
        }
        await asyncio.sleep(0.01)
        await registry.take("one", "a", 2)  # nobody has it
        taking = asyncio.ensure_future(registry.take("one", "b", 2))
        assert await asked["a"] == ("one", 2)
        await asyncio.sleep(5)
        assert not taking.done(), "it is still at a"
        await registry.left("one", "a", 2)
        await taking
        taking = asyncio.ensure_future(registry.take("kept", "c", 2))  # of before a restart
        assert await registry.asked("a", handles["a"], {"kept": 1}, 2) == ("kept", 1)
        await registry.left("kept", "a", 1)
        await taking
        handles["b"].dead = True
        now = asyncio.get_running_loop().time()
        await registry.take("one", "c", 3)
        assert asyncio.get_running_loop().time() == now, "the dead are not waited for"
        await registry.left("one", "b", 2)
        assert registry._owners == {"one": ("c", 3), "kept": ("c", 2)}
        await registry.take("one", "a", 3)  # c says nothing: after a while
        await registry.left("one", "a", 3)
        await registry.left("kept", "c", 2)
        assert not registry._owners and not registry._waited

    run(test())


def test_the_end_of_a_stay_is_not_that_of_a_later_one() -> None:
    """A client goes from a to b and back, and a says once more, or late, that it left."""

    async def test() -> None:
        registry = Registry()
        handles = await known(registry, "a", "b")
        await registry.take("one", "a", 1)
        for replica, number, before, ended in (("b", 1, "a", 1), ("a", 2, "b", 1)):
            taking = asyncio.ensure_future(registry.take("one", replica, number))
            assert await registry.asked(before, handles[before], {"one": 1}, 1) == ("one", 1)
            await registry.left("one", before, ended)
            await taking
        await registry.left("one", "a", 1)
        assert registry._owners == {"one": ("a", 2)}
        await registry.take("one", "a", 4)  # before what was said earlier
        await registry.take("one", "a", 3)
        await registry.left("one", "a", 3)
        assert registry._owners == {"one": ("a", 4)}

    run(test())


def test_who_was_asked_in_vain_is_not_asked_once_nobody_waits() -> None:
    async def test() -> None:
        registry = Registry()
        handles = await known(registry, "a", "b")
        await registry.take("one", "a", 1)
        await registry.take("one", "b", 1)  # a does not answer
        taking = asyncio.ensure_future(registry.take("one", "a", 2))
        await asyncio.sleep(1)
        await registry.left("one", "b", 1)
        await taking
        assert await registry.asked("a", handles["a"], {"one": 2}, 2) is None
        taking = asyncio.ensure_future(registry.take("one", "b", 2))
        assert await registry.asked("a", handles["a"], {"one": 2}, 2) == ("one", 2)
        await registry.left("one", "a", 2)
        await taking

    run(test())


def test_what_was_not_heard_is_learnt_when_a_replica_asks_again() -> None:
    async def test() -> None:
        registry = Registry()
        handles = await known(registry, "a", "b")
        await registry.take("gone", "a", 1)
        await registry.take("later", "a", 3)  # than what a says below
        taking = asyncio.ensure_future(registry.take("gone", "b", 1))
        await asyncio.sleep(1)
        asking = asyncio.ensure_future(registry.asked("a", handles["a"], {"lost": 2}, 2))
        await asyncio.wait_for(taking, 0.5)  # a's stay is over, which it may have said in vain
        assert registry._owners == {"gone": ("b", 1), "later": ("a", 3), "lost": ("a", 2)}
        assert await asking is None
        assert await registry.asked("a", handles["a"], {}, 3) is None
        assert registry._owners == {"gone": ("b", 1)}

    run(test())


@contextlib.contextmanager
def cluster(replicas: int, seed: int = 0) -> Iterator[Cluster]:
    made = Cluster(replicas, seed)
    try:
        yield made
    finally:
        made.close()


def test_who_comes_back_to_a_replica_that_is_asked_for_him_stays() -> None:
    """It is asked while the client takes over its own row there, and must not end what follows."""
    asked_meanwhile = 0
    for seed in range(20):
        with cluster(2, seed) as two:
            two.come(0, "one")
            two.pass_time(30)
            two.come(1, "one")
            two.come(0, "one")
            first = two.stays[key("one")]
            for _ in range(1000):
                two.pass_time(0.01)
                asked_meanwhile += bool(two.places[0].others._letting) and (
                    first <= two.stays.get(key("one"), set())
                )
            two.settle()
    assert asked_meanwhile, "otherwise this tries nothing"


PLACES, NAMES = st.integers(0, 2), st.sampled_from(["one", "two"])
EVENTS = st.one_of(
    st.tuples(st.just("come"), PLACES, NAMES),
    st.tuples(st.just("come"), PLACES, NAMES),
    st.tuples(st.just("go"), PLACES, NAMES),
    st.tuples(st.just("pass_time"), st.sampled_from([0.01, 0.3, 3.0, 12.0])),
    st.tuples(st.just("kill"), PLACES),
    st.tuples(st.just("restart")),
)


@settings(max_examples=100)
@given(st.lists(EVENTS, max_size=30), st.integers(0, 2**16))
def test_a_living_owner_is_never_forgotten_nor_asked_for_nobody(events: Any, seed: int) -> None:
    with cluster(3, seed) as three:
        for event, *what in events:
            getattr(three, event)(*what)
            three.pass_time(0.01)
        three.settle()
