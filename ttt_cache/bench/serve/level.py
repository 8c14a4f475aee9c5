"""All clients of one level, in processes of their own, on one clock."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from .client import GRACE_S
from .figures import Level, figures, refused
from .plan import Plan
from .server import Seen, conversations, look
from .share import Share, run

CLIENTS = 32  # of a process
AHEAD_S = 0.3  # between the word to begin and the first frame
FREE_S = 10.0  # for a server to be rid of the conversations of the level before
Tick = Callable[[float], object]


def seconds(plan: Plan) -> float:
    """How long the conversations of a level take, at least."""
    return plan.warm_up + plan.seconds


def measure(plan: Plan, clients: int, delay: int, tick: Tick) -> Level:
    """Hold so many conversations at once.

    Args:
        delay: of the server's model, in frames.
        tick: told, again and again, how many of `seconds` have passed.
    """
    _free(plan)
    with _processes(plan, clients, delay) as pipes:
        reasons = [reason for pipe in pipes for reason in _received(pipe)]
        if reasons:
            return refused(clients, reasons)
        begin = time.monotonic() + AHEAD_S  # the same clock in every process of a machine
        for pipe in pipes:
            pipe.send(begin)
        before = _meanwhile(plan, pipes, begin + plan.warm_up, begin, tick)
        after = _meanwhile(plan, pipes, begin + seconds(plan), begin, tick)
        heard = [each for pipe in pipes for each in _received(pipe)]
    return figures(clients, heard, before, after)


def _meanwhile(
    plan: Plan, pipes: list[Connection], until: float, begin: float, tick: Tick
) -> Seen | None:
    """Look at the server at a moment, or as soon as a process has ended."""
    while (left := until - time.monotonic()) > 0 and not wait(pipes, min(left, 0.5)):
        tick(time.monotonic() - begin)
    return look(plan)


def _received(pipe: Connection) -> list[Any]:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("a process of clients died; what it said is above") from None


def _free(plan: Plan) -> None:
    """Wait until nobody is left of the level before, where a server tells."""
    deadline = time.monotonic() + FREE_S
    while conversations(plan) and time.monotonic() < deadline:
        time.sleep(0.2)


@contextmanager
def _processes(plan: Plan, clients: int, delay: int) -> Iterator[list[Connection]]:
    """Processes that share the clients; whatever becomes of the level, they are gone afterwards."""
    # Forked from a process that has done nothing but import: no thread and no lock is copied.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.__module__])
    count = min(-(-clients // CLIENTS), os.cpu_count() or 1)
    started, pipes = [], []
    try:
        for number in range(count):
            numbers = range(clients * number // count, clients * (number + 1) // count)
            here, there = context.Pipe()
            share = Share(plan, numbers, clients, delay)
            process = context.Process(target=run, args=(share, there), daemon=True)
            process.start()
            there.close()
            started.append(process)
            pipes.append(here)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in started:  # a closed pipe ends them
            process.join(GRACE_S)
            process.kill()
            process.join()
