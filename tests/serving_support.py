"""Servers for the tests of `ttt-cache serve`, and what each client would get alone.

What is right is computed as `moshi.server` computes it: one row, in the order of its loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import sphn
import torch
from launch_files import FRAME, RATE, Checkpoint, write_config
from launch_support import SMALL
from moshi.models.lm import LMGen
from moshi.models.loaders import CheckpointInfo

from ttt_cache.launch import from_settings, handed_out
from ttt_cache.serving.accept import Door
from ttt_cache.serving.clock import Clock
from ttt_cache.serving.codec import CODECS, Codec
from ttt_cache.serving.engine import Engine
from ttt_cache.serving.host import Host
from ttt_cache.serving.listen import bound
from ttt_cache.serving.metrics import Metrics
from ttt_cache.serving.pool import Pool
from ttt_cache.serving.sessions import Sessions
from ttt_cache.serving.talk import Limits
from ttt_cache.serving.web import Web

SETTINGS = dict(zip((word.strip("-") for word in SMALL[::2]), SMALL[1::2], strict=True))
Reply = tuple[np.ndarray, int] | None  # samples and token of the text

VOICES, LENGTH = 4, 24  # of what is heard, and frames of each


def greedy(checkpoint: Checkpoint) -> str:
    """A config that says what is likeliest, beside the checkpoint's own; returns its name."""
    config = json.loads((checkpoint.folder / "config.json").read_text())
    write_config(
        checkpoint.folder / "greedy.json", config | {"lm_gen_config": {"use_sampling": False}}
    )
    return "greedy.json"


@dataclass
class Models:
    """Two copies of a patched Moshi and its Mimi: a model streams one batch at a time."""

    batched: tuple[Any, Any]
    single: tuple[Any, Any]
    piece: Any

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Models:
        file = checkpoint.folder.joinpath
        info = CheckpointInfo.from_hf_repo(
            "none/needed",
            file("model.safetensors"),
            file("mimi.safetensors"),
            file("tokenizer.model"),
            file("config.json"),
        )
        pairs = []
        for _ in range(2):
            torch.manual_seed(1)  # of the untrained memory
            with handed_out(_stirred):
                pairs.append((info.get_moshi("cpu", torch.float32), info.get_mimi("cpu")))
        return cls(*pairs, info.get_text_tokenizer().id_to_piece)  # type: ignore[attr-defined]

    def engine(self, rows: int) -> Engine:
        """Whatever streamed before has ended."""
        model, mimi = self.batched
        for each in self.batched:
            each._stop_streaming()
        return Engine(LMGen(model, use_sampling=False, support_out_of_sync=True), mimi, rows)

    @torch.no_grad()
    def alone(self, pcm: np.ndarray) -> list[Reply]:
        """What Moshi's server answers to float32 `[n * FRAME]`, frame by frame."""
        model, mimi = self.single
        for each in self.single:
            each._stop_streaming()
        gen = LMGen(model, use_sampling=False)
        gen.streaming_forever(1)
        mimi.streaming_forever(1)
        replies: list[Reply] = []
        for number, frame in enumerate(np.split(pcm, len(pcm) // FRAME)):
            codes = mimi.encode(torch.from_numpy(frame)[None, None])
            if number == 0:
                mimi.reset_streaming()
            tokens = gen.step(codes)
            if tokens is None:
                replies.append(None)
            else:
                samples = mimi.decode(tokens[:, 1:])[0, 0].numpy()
                replies.append((samples, int(tokens[0, 0, 0])))
        return replies


def _stirred(model: Any) -> Any:
    """Install a cache whose memory says something: an untrained one is silent."""
    handle = from_settings(SETTINGS)(model)
    for layer in model.transformer.layers:
        for parameter in layer.self_attn.ttt_cache.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return handle


def voices(speech: Path, count: int, frames: int) -> list[np.ndarray]:
    """Sounds that differ, float32 `[frames * FRAME]` each."""
    said = sphn.read(str(speech))[0][0]
    random = np.random.default_rng(0)
    sounds = []
    for number in range(count):
        loud = np.resize(np.roll(said, 7001 * number), frames * FRAME) * random.uniform(0.3, 1)
        sounds.append((loud + random.normal(0, 0.01, frames * FRAME)).astype(np.float32))
    return sounds


def decoded(codec: Codec, payload: bytes) -> list[np.ndarray]:
    """All frames that a message completes."""

    async def gathered() -> list[np.ndarray]:
        return [frame async for frame in codec.decode(payload)]

    return asyncio.run(gathered())


def agree(said: list[Reply], expected: list[Reply]) -> None:
    """Assert that a conversation was answered so: every token, samples to the last bits."""
    assert [reply and reply[1] for reply in said] == [reply and reply[1] for reply in expected]
    for reply, right in zip(said, expected, strict=True):
        assert (reply is None) is (right is None)
        if reply is not None and right is not None:
            np.testing.assert_allclose(reply[0], right[0], atol=1e-4)


@dataclass
class Served:
    """A server in this process."""

    port: int
    host: Host
    clock: Clock
    engine: Engine
    door: Door

    def url(self, path: str = "/api/chat") -> str:
        return f"http://localhost:{self.port}{path}"


@asynccontextmanager
async def served(
    models: Models,
    rows: int,
    sessions: Path | None = None,
    save_every: float = 30.0,
    token: str | None = None,
    pool: Pool | None = None,
    **limits: float,
) -> AsyncIterator[Served]:
    """A server in this process, as `ttt_cache.serving.run` puts it together."""
    with ThreadPoolExecutor(1) as thread:
        engine = models.engine(rows)
        metrics = Metrics(rows, engine.state_bytes())
        clock = Clock(engine, metrics, thread)
        store = None if sessions is None else Sessions(sessions, 3600)
        codecs = CODECS if pool is None else {**CODECS, "opus": pool.opus}
        host = Host(engine, clock, metrics, models.piece, store, save_every, codecs=codecs)
        listeners = bound("127.0.0.1", 0)
        port = listeners[0].getsockname()[1]
        door = Door(Web(host, Limits(**limits), token).application(), listeners, rows)
        await door.open()
        tasks = [asyncio.ensure_future(clock.run())]
        if pool is not None:
            await pool.attach()
            tasks.append(asyncio.ensure_future(pool.keep()))
        if store is not None:
            tasks.append(asyncio.ensure_future(host.save()))
        try:
            yield Served(port, host, clock, engine, door)
        finally:
            await host.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await door.close()


class Client:
    """Moshi's client: sends whole frames as Opus, gathers samples and text.

    Attributes:
        frames: that were answered with sound.
        described: what the server said of the conversation.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.text, self.session = socket, "", ""
        self.described: dict[str, Any] = {}  # its state, as the server said it
        self.samples = np.zeros(0, np.float32)
        self._writer, self._reader = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)

    async def say(self, pcm: np.ndarray) -> None:
        for frame in np.split(pcm.astype(np.float32), len(pcm) // FRAME):
            if packet := self._writer.append_pcm(frame):
                await self.socket.send_bytes(b"\x01" + packet)

    @property
    def frames(self) -> float:
        return len(self.samples) / FRAME

    async def hear(self, frames: int) -> None:
        """Until it has answered so many frames in all; ends with what closes the connection."""
        while self.frames < frames:
            self._take(await self.socket.receive_bytes())

    async def hear_for(self, seconds: float) -> None:
        """Whatever comes meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    self._take(await self.socket.receive_bytes())
        except TimeoutError:
            pass

    def _take(self, message: bytes) -> None:
        kind, payload = message[0], message[1:]
        assert kind in (1, 2, 4), "audio, text or metadata"
        if kind == 1:
            self.samples = np.concatenate([self.samples, self._reader.append_bytes(payload)])
        elif kind == 2:
            self.text += payload.decode()
        else:
            self.described = json.loads(payload)
            self.session = self.described["session"]


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Client]:
    """A client that has been greeted."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.ws_connect(url, **options) as socket,
    ):
        assert await socket.receive_bytes() == b"\x00", "the handshake"
        client = Client(socket)
        client.session = socket._response.headers["X-Session-Id"]
        yield client


def run(coroutine: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await coroutine

    asyncio.run(limited())


async def until(condition: Any, seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def closed(client: Client) -> int | None:
    """Wait until the server has closed a connection; returns the code."""
    with contextlib.suppress(TypeError):  # a message that is no answer
        await client.hear_for(30)
    return client.socket.close_code


async def refused(url: str, **options: Any) -> tuple[int, str]:
    """Status and reason of an upgrade that is refused."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    upgrade |= options.pop("headers", {})
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers=upgrade, **options) as response,
    ):
        return response.status, await response.text()
