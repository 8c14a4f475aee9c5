"""`ttt-cache serve --ray`: two replicas, of which one is killed; and what is refused.

All but the last test share a cluster of two CPUs, and all but the first of those a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch_files import FRAME, Checkpoint, add_model
from launch_support import SMALL, free_port
from ray_support import cluster, command, descendants, finish
from serving_support import connected, greedy, refused, until, voices
from typer.testing import CliRunner

from ttt_cache.cli import main

ray = pytest.importorskip("ray")
from ray_server import SECRET, Two, ends, some  # noqa: E402

from ttt_cache.serving.cluster import run as cluster_run  # noqa: E402

ROWS, LENGTH = 4, 24


def arguments(checkpoint: Checkpoint, port: int, *more: object, config: str = "") -> list[str]:
    flags = checkpoint.flags(config or greedy(checkpoint), flag="--config-path")
    words = ("serve", "--ray", "--port", port, "--rows", ROWS, *SMALL, *flags, *more)
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def machine() -> Iterator[Any]:
    with cluster(cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def server(machine: Any, small_moshi: Checkpoint, tmp_path_factory: Any) -> Iterator[Two]:
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    words = arguments(small_moshi, port, "--replicas", 2, "--sessions", "s", "--save-every", 0.5,
                      "--token", SECRET)  # fmt: skip
    with command(words, folder, f"2 x {ROWS} conversations at http"):
        yield Two(port, folder / "s")


@pytest.fixture
def two(server: Two) -> Two:
    """Nobody is there, and whatever was killed before is replaced, however long that takes."""
    asyncio.run(until(lambda: server.whole() and not server.owners(), 180))
    return server


@pytest.fixture
def pcm(small_moshi: Checkpoint) -> Any:
    return voices(small_moshi.speech, 1, LENGTH)[0]


def run(coroutine: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await coroutine

    asyncio.run(limited())


def call(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_model_that_cannot_be_batched_is_refused_as_without_ray(
    machine: Any, small_moshi: Checkpoint
) -> None:
    config = add_model(small_moshi, "mute", dep_q=0, n_q=2, delays=[0, 0, 0])
    words = arguments(small_moshi, free_port(), "--moshi-weight",
                      small_moshi.folder / "mute.safetensors", config=config.name)  # fmt: skip
    with contextlib.ExitStack() as processes, pytest.raises(AssertionError) as ended:
        processes.enter_context(command(words, small_moshi.folder, "conversations at"))
    said = str(ended.value).strip().splitlines()
    assert said[-1] == "ttt-cache: the model must speak; this one has dep_q = 0 and only writes"
    assert len(said) <= 2, "Ray may add a line of its own"


def test_conversations_of_a_killed_replica_go_on_with_the_other(two: Two, pcm: Any) -> None:
    """From the last save, which is at most so old as `--save-every` says; the others go on."""

    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = await stack.enter_async_context(some(two, 4))
            for each in clients:
                await each.say(pcm)
            for each in clients:
                await each.hear(LENGTH - 1)
            await until(lambda: two.saved() == [LENGTH] * 4)
            for each in clients:
                await each.say(pcm[: 5 * FRAME])
                await each.hear(LENGTH + 4)
            replicas = descendants(os.getpid(), "ServeReplica")
            assert len(replicas) == 2
            ending = [asyncio.ensure_future(ends(each)) for each in clients]
            os.kill(next(iter(replicas)), signal.SIGKILL)
            await until(lambda: any(each.done() for each in ending))
            await asyncio.sleep(0.5)
            dead = [each for each, end in zip(clients, ending, strict=True) if end.done()]
            assert 1 <= len(dead) <= 3, "those of the other go on"
            for end in ending:
                end.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            for each in clients:
                if each not in dead:
                    await each.say(pcm[: 5 * FRAME])
                    await each.hear(LENGTH + 9)
            for each in dead:
                assert each.socket.close_code == 1006
                again = await stack.enter_async_context(connected(two.url(each.session)))
                await again.say(pcm[: 5 * FRAME])
                await again.hear(5)
                assert LENGTH <= again.described["frames"] <= LENGTH + 5
                assert again.session == each.session
            assert len(set(two.owners().values())) == 1, "the other has all four"

    run(test())


def test_who_comes_back_takes_over_from_another_replica(two: Two, pcm: Any) -> None:
    """The old connection is still open: its replica saves, and closes it."""

    async def test() -> None:
        async with connected(two.url()) as first:
            await first.say(pcm)
            await first.hear(LENGTH - 1)
            (before,) = two.owners().values()
            async with contextlib.AsyncExitStack() as stack:
                for more in range(30):  # until it comes to the other one
                    ending = asyncio.ensure_future(ends(first))
                    url = two.url(first.session)
                    second = await stack.enter_async_context(connected(url))
                    assert await ending == 4001
                    await second.say(pcm[:FRAME])
                    await second.hear(1)
                    assert second.described["frames"] == LENGTH + more
                    (after,) = two.owners().values()
                    if after != before:
                        return
                    first = second
            raise AssertionError("one of two replicas gets all")

    run(test())


def test_a_registry_that_is_restarted_is_told_what_there_is(two: Two, pcm: Any) -> None:
    async def test() -> None:
        async with connected(two.url()) as client:
            (registry,) = descendants(os.getpid(), "Registry")
            before = two.owners()
            os.kill(registry, signal.SIGKILL)

            def told() -> bool:
                with contextlib.suppress(ray.exceptions.RayError):
                    return two.owners() == before
                return False

            await until(told, 30)
            await client.say(pcm)
            await client.hear(LENGTH - 1)

    run(test())


def test_who_comes_when_all_are_full_is_refused_and_so_is_who_has_no_token(two: Two) -> None:
    async def test() -> None:
        assert await refused(two.url(token="wrong")) == (401, "a token is needed")
        assert (await refused(two.url("a" * 32)))[0] == 404
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2 * ROWS):  # none is refused, whichever it comes to
                await stack.enter_async_context(connected(two.url()))
            for _ in range(4):
                said = 503, "all conversations are taken; try again later"
                assert await refused(two.url()) == said

    run(test())


def test_what_is_refused_before_it_begins(
    two: Two, small_moshi: Checkpoint, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "file").write_text("")
    words = arguments(small_moshi, free_port())
    for more, said in (
        (["--sessions", tmp_path / "file"], "--sessions must be a folder"),
        (["--port", two.port], f"port {two.port} is in use by another ttt-cache serve --ray"),
        (["--device", "cuda:1"], "--device must name no number with --ray, got cuda:1"),
        (["--token", ""], "--token must be printable ASCII"),
    ):
        result = call(*words, *more)
        assert result.exit_code == 2 and said in result.stderr, (more, result.output)
    with monkeypatch.context() as alone:  # Ray itself would try whatever looks like it
        alone.setenv("RAY_ADDRESS", "auto")
        alone.setattr(cluster_run, "read_ray_address", lambda: None)
        with pytest.raises(ValueError, match="RAY_ADDRESS=auto: none was begun"):
            cluster_run._connect()
    result = call("serve", "--replicas", 2)
    assert result.exit_code == 2 and "--replicas is for --ray" in result.stderr
    command_module = sys.modules["ttt_cache.cli.serve"]
    monkeypatch.setattr(command_module, "find_spec", lambda name: name != "ray" or None)
    result = call("serve", "--ray")
    assert result.exit_code == 2 and "pip install 'ttt-cache[ray]'" in result.stderr


@pytest.mark.parametrize(
    ("environment", "more", "said"),
    [
        ({}, [], "Ray Serve runs on this cluster already"),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, [], "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1"),
    ],
)
def test_clusters_that_cannot_be_used(
    environment: Any, more: Any, said: str, two: Two, small_moshi: Checkpoint, monkeypatch: Any
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = arguments(small_moshi, free_port(), *more)
    with contextlib.ExitStack() as processes, pytest.raises(AssertionError, match=said) as ended:
        processes.enter_context(command(words, small_moshi.folder, "conversations at"))
    assert "Traceback" not in str(ended.value)


def test_a_cluster_of_its_own_saves_all_and_leaves_nothing(
    small_moshi: Checkpoint, pcm: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """One replica, begun and ended with the command; every conversation is closed with 1001."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    port = free_port()
    words = arguments(small_moshi, port, "--sessions", "s", "--save-every", 1000)
    with command(words, tmp_path, f"1 x {ROWS} conversations at http") as process:
        began = descendants(process.pid)
        (replica,) = descendants(process.pid, "ServeReplica")
        assert os.getpriority(os.PRIO_PROCESS, replica) == 0, "frames cannot wait"
        server = Two(port, tmp_path / "s")

        async def test() -> None:
            async with connected(server.url()) as one, connected(server.url()) as other:
                for each in (one, other):
                    await each.say(pcm)
                    await each.hear(LENGTH - 1)
                process.send_signal(signal.SIGTERM)
                assert [await ends(one), await ends(other)] == [1001, 1001]

        run(test())
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "stopping" in said and "Traceback" not in said, said
        assert server.saved() == [LENGTH] * 2
        assert not finish(began)
