"""The clients of one process: Opus and the event loop of many would need more than one core."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import aiohttp

from ttt_cache.serving.conversation import FRAME_S

from .client import Client, Heard, RefusedError
from .plan import Plan
from .sound import messages

AT_ONCE = 16  # connections that are being made


@dataclass(frozen=True)
class Share:
    """Some clients of a level.

    Args:
        numbers: of the clients, among `total`. Their schedules are spread over a frame evenly.
        delay: of the model, in frames.
    """

    plan: Plan
    numbers: range
    total: int
    delay: int


def run(share: Share, pipe: Connection) -> None:
    """Be these clients; the main function of a process.

    It sends the reasons of those who were refused, waits for the moment to begin, and sends a
    `Heard` for each client. It ends as soon as the other end of the pipe is closed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides
    with contextlib.suppress(asyncio.CancelledError, EOFError, BrokenPipeError):
        asyncio.run(_run(share, pipe))


async def _run(share: Share, pipe: Connection) -> None:
    loop, whole = asyncio.get_running_loop(), asyncio.current_task()
    assert whole is not None
    seed = share.plan.seed + share.numbers.start
    said = await messages(share.plan.codec, share.plan.frames, seed)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        clients, refused = await _connect(share, session)
        try:
            pipe.send(refused)
            begin = await loop.run_in_executor(None, pipe.recv)
            loop.add_reader(pipe.fileno(), whole.cancel)  # nothing more comes but the end
            heard = await _converse(share, clients, said, begin)
            loop.remove_reader(pipe.fileno())
            pipe.send(heard)
        finally:
            await asyncio.gather(*(client.close() for client in clients))


async def _connect(share: Share, session: aiohttp.ClientSession) -> tuple[list[Client], list[str]]:
    """The clients that were taken in, and why others were not; after one of these no more try."""
    gate, clients, refused = asyncio.Semaphore(AT_ONCE), list[Client](), list[str]()

    async def one() -> None:
        async with gate:
            if refused:
                return
            try:
                clients.append(await Client.connect(session, share.plan))
            except RefusedError as error:
                refused.append(str(error))

    await asyncio.gather(*(one() for _ in share.numbers))
    return clients, refused


async def _converse(
    share: Share, clients: list[Client], said: list[bytes], begin: float
) -> list[Heard]:
    """All conversations, without what was warming up."""
    starts = (begin + FRAME_S * number / share.total for number in share.numbers)
    heard = await asyncio.gather(
        *(client.converse(said, start, share.delay)
          for client, start in zip(clients, starts, strict=True))
    )  # fmt: skip
    first = share.plan.warm_up_frames
    answered = max(first - share.delay, 0)
    return [replace(h, waited=h.waited[answered:], behind=h.behind[first:]) for h in heard]
