"""How servers at one port find each other and pass connections on, whatever became of some."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from pathlib import Path

import pytest
from serving_support import run
from street_support import street

from ttt_cache.serving.cluster import neighbours as module
from ttt_cache.serving.cluster.neighbours import ROOM, meeting_place
from ttt_cache.serving.cluster.passing import listening, listens, receive, send

pytest.importorskip("ray")


def claimed(folder: Path, name: str, ago: float = 0.0) -> Path:
    """The file of a neighbour that has a great deal of room; returns the path of its socket."""
    (folder / f"{name}.room").write_bytes(ROOM.pack(100, 100, time.monotonic() - ago))
    return folder / f"{name}.socket"


def test_who_was_killed_is_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        listening(claimed(tmp_path, "before"), 1).close()
        async with street(tmp_path, 1, 0) as (made, client):
            assert not list(tmp_path.glob("before.*")), "by whoever comes after it"
            listening(claimed(tmp_path, "after"), 1).close()
            claimed(tmp_path, "without")
            came = [await made.come(client) for _ in range(5)]
            assert came[0] and not any(came[1:])
        assert not list(tmp_path.glob("house*")), "who ends leaves nothing"

    run(test())


def test_who_does_not_take_anything_is_passed_over(tmp_path: Path) -> None:
    async def test() -> None:
        async with street(tmp_path, 1, 1) as (made, client):
            with contextlib.ExitStack() as stack:
                hung = claimed(tmp_path, "hung")
                stack.enter_context(listening(hung, 0))
                ours, _ = socket.socketpair()
                while send(hung, ours, 0):
                    ours, _ = socket.socketpair()
                stack.enter_context(listening(claimed(tmp_path, "late", module.ALIVE_S), 1))
                came = [await made.come(client) for _ in range(5)]
                assert all(came[:2]) and not any(came[2:])
                assert listens(hung) and hung.exists(), "it may live"

    run(test())


def test_what_is_sent_to_a_neighbour(tmp_path: Path) -> None:
    """Connections, with what was said before; whatever else comes is passed over."""
    path = tmp_path / "socket"

    async def test() -> None:
        assert not listens(path) and not send(path, socket.socketpair()[0], 0)
        with listening(path, 8) as listener:
            assert listens(path)
            for message in (b"", b"x"):  # without a connection
                with socket.socket(socket.AF_UNIX) as stranger:
                    stranger.connect(str(path))
                    stranger.sendall(message)
            here, there = socket.socketpair()
            with there:
                there.sendall(b"said before")
                assert send(path, here, 7) and here.fileno() == -1
                received, number = await receive(listener)
                with received:
                    assert number == 7 and received.recv(20) == b"said before"
                    assert not received.getblocking() and not received.get_inheritable()
                assert there.recv(1) == b"", "nobody else has it open"

    run(test())


def test_the_meeting_place_is_for_its_user_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's are too long for a socket
        meet(Path(folder), monkeypatch)


def meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = meeting_place("a server")
    assert place == meeting_place("a server") != meeting_place("another")
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o770)
    with pytest.raises(ValueError, match="this user alone"):
        meeting_place("a server")
    place.rmdir()
    place.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="this user alone"):
        meeting_place("a server")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    with pytest.raises(ValueError, match="TMPDIR must be shorter"):
        meeting_place("a server")
