"""Whether a server that speaks Moshi's protocol is there, and the delay of its model."""

from __future__ import annotations

import asyncio

import aiohttp

from .client import Client, EndedError, RefusedError
from .plan import Plan
from .sound import messages

MOST_FRAMES = 32  # that a model's delays may leave without an answer
PATIENCE_S = 2.0  # for an answer, before it is taken that there is none


def probe(plan: Plan) -> int:
    """How many frames a server hears before it answers.

    One client sends a frame, and the next one only when no answer came for a while: under load one
    could not tell a model that is not to answer yet from one that is late.

    Raises:
        ValueError: there is no such server, or it takes nobody in; the message is for the user.
    """
    try:
        return asyncio.run(_probe(plan))
    except RefusedError as error:
        raise ValueError(
            f"no conversation at {plan.url}: {error}. 'ttt-cache serve' starts a server here, "
            "--url names another one"
        ) from None
    except EndedError as error:
        raise ValueError(f"the first conversation at {plan.url} ended: {error}") from None


async def _probe(plan: Plan) -> int:
    async with aiohttp.ClientSession() as session:
        client = await Client.connect(session, plan)
        try:
            for delay, message in enumerate(await messages(plan.codec, MOST_FRAMES, plan.seed)):
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        await client.send(message)
                        await client.hear(1)
                except TimeoutError:
                    continue
                return delay
        finally:
            await client.close()
    raise EndedError(f"{MOST_FRAMES} frames were sent and none was answered")
