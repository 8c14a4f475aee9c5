"""Clients that talk to a server at the pace of speech, and note how long each answer took."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from typing import Any

import aiohttp
import numpy as np
from strangers import TOKEN
from voices import DELAY, packets

from ttt_cache.bench.serve.client import Client
from ttt_cache.bench.serve.match import latencies
from ttt_cache.bench.serve.plan import make_plan
from ttt_cache.bench.serve.sound import FRAME
from ttt_cache.serving.conversation import FRAME_S


async def talk(client: Client, number: int, over: Any) -> list[tuple[float, float]]:
    """Talk until it is over; returns when each answered frame was due to be said, and its wait.

    Raises:
        ttt_cache.bench.serve.client.EndedError: the server closed the connection before.
    """
    sound = np.random.default_rng(number).normal(0, 0.1, (1, FRAME)).astype(np.float32)
    said = itertools.takewhile(lambda _: not over.is_set(), packets("opus", sound))
    begin = time.monotonic() + number * 0.013
    hearing = asyncio.ensure_future(client.hear(math.inf))
    try:
        await client.say(said, begin)
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
    due = begin + np.arange(len(client.arrived) + DELAY) * FRAME_S
    waited = latencies(due, np.array(client.arrived), DELAY)
    return list(zip(due[DELAY:].tolist(), waited.tolist(), strict=True))


def talkers(port: int, count: int, over: Any, pipe: Any) -> None:
    """All that talk; a process. Sends `None` when they begin, and at the end what they noted."""

    async def together() -> list[tuple[float, float]]:
        plan = make_plan(f"http://127.0.0.1:{port}", TOKEN)
        async with contextlib.AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession())
            clients = []
            for _ in range(count):
                clients.append(await Client.connect(session, plan))
                stack.push_async_callback(clients[-1].close)
            pipe.send(None)
            talking = (talk(client, number, over) for number, client in enumerate(clients))
            return list(itertools.chain(*await asyncio.gather(*talking)))

    pipe.send(asyncio.run(together()))
