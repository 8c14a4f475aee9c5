"""Clients that break the protocol, flood, do not read or fall silent hurt nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from typing import Any

import numpy as np
import pytest
import sphn
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_files import FRAME, RATE, Checkpoint
from serving_support import (
    Client,
    Models,
    Served,
    closed,
    connected,
    decoded,
    run,
    served,
    until,
    voices,
)

from ttt_cache.serving import talk as talk_module
from ttt_cache.serving.conversation import INBOX, OUTBOX, Conversation
from ttt_cache.serving.engine import Answer
from ttt_cache.serving.errors import MalformedError
from ttt_cache.serving.opus import Opus

LENGTH = 24


@pytest.fixture(scope="module")
def speech(small_moshi: Checkpoint) -> np.ndarray:
    return voices(small_moshi.speech, 1, LENGTH)[0]


async def ends(server: Served, *messages: Any) -> int | None:
    """The code that a client is closed with that sends these."""
    async with connected(server.url()) as client:
        for message in messages:
            send = client.socket.send_str if isinstance(message, str) else client.socket.send_bytes
            await send(message)
        return await closed(client)


def test_what_breaks_the_protocol_ends_its_own_conversation_only(
    models: Models, speech: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talk_module, "MOST_PASSED", 20)

    async def test() -> None:
        async with served(models, 2) as server:
            async with connected(server.url()) as good:
                for code, messages in (
                    (1007, [b"\x01no Ogg at all" * 9]),
                    (1007, [b"\x01OggS" + bytes(2000)]),
                    (1009, [b"\x01" + bytes(talk_module.MOST_BYTES)]),
                    (1008, [b"\x07", b"", "text"] * 7),
                ):
                    assert await ends(server, *messages) == code
                    await until(lambda: server.engine.free == 1)
                await good.say(speech)
                await good.hear(LENGTH - 1)
            metrics = server.host.metrics.text().decode()
            ended = [line for line in metrics.splitlines() if "ended_total{" in line]
            assert 'ttt_cache_ended_total{code="1007"} 2.0' in ended

    run(test())


def ogg_page(number: int, body: bytes) -> bytes:
    """A page (RFC 3533) of a packet that began before it and goes on after it."""
    segments = len(body) // 255
    head = b"OggS" + struct.pack("<BBqII", 0, 1, -1, 42, number)
    rest = bytes([segments, *[255] * segments]) + body
    checksum = 0
    for byte in head + bytes(4) + rest:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum >> 31 else 0)) & 0xFFFFFFFF
    return head + struct.pack("<I", checksum) + rest


def test_a_packet_that_never_ends_is_not_held(models: Models, speech: np.ndarray) -> None:
    """Its decoder keeps all of it, and one frame after a thousand messages would renew the right to
    send as many."""
    pages = [b"\x01" + ogg_page(10 + number, bytes(50 * 255)) for number in range(30)]

    async def test() -> None:
        async with served(models, 1) as server, connected(server.url()) as client:
            await client.say(speech[: 2 * FRAME])
            for page in pages:
                await client.socket.send_bytes(page)
            assert await closed(client) == 1008

    run(test())


def test_messages_of_other_kinds_are_passed_over(models: Models, speech: np.ndarray) -> None:
    async def test() -> None:
        async with served(models, 1) as server, connected(server.url()) as client:
            for message in (b"", b"\x00", b"\x01", b"\x02hello", b"\x03\x00", b"\xff" * 100):
                await client.socket.send_bytes(message)
            await client.socket.send_str("hello")
            await client.socket.ping()
            await client.say(speech)
            await client.hear(LENGTH - 1)

    run(test())


def test_silence_and_half_open_connections_free_their_row(models: Models) -> None:
    async def test() -> None:
        async with served(models, 2, idle=0.3) as server:
            async with connected(server.url()) as client:
                pinging = asyncio.ensure_future(ping(client))
                assert await closed(client) == 1008
                pinging.cancel()
            await until(lambda: server.engine.free == 2)
            dead = await asyncio.to_thread(half_open, server.port)
            await until(lambda: server.engine.free == 1)
            await until(lambda: server.engine.free == 2)
            dead.close()

    run(test())


async def ping(client: Client) -> None:
    while True:
        await client.socket.ping()
        await asyncio.sleep(0.02)


def half_open(port: int) -> socket.socket:
    """A client that upgrades, and is never heard of again."""
    dead = socket.create_connection(("localhost", port))
    dead.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    dead.sendall(
        b"GET /api/chat HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    return dead


def test_a_client_that_does_not_read_is_ended_and_others_go_on(
    models: Models, speech: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Audio alone would take minutes to fill the sockets' buffers.
    monkeypatch.setattr(Conversation, "messages", flooding(Conversation.messages))
    monkeypatch.setattr(talk_module, "CLOSE_S", 0.2)

    async def test() -> None:
        async with served(models, 2, write=0.3) as server:
            async with connected(server.url(), max_msg_size=0) as slow:
                await slow.say(speech)
                await until(lambda: server.engine.free == 1)
                await until(lambda: server.engine.free == 2)
            metrics = server.host.metrics.text().decode()
            assert 'ttt_cache_ended_total{code="1008"} 1.0' in metrics

    run(test())


def flooding(messages: Any) -> Any:
    async def more(self: Conversation) -> list[bytes]:
        return [*await messages(self), b"\x02" + bytes(4_000_000)]

    return more


def test_queues_are_short_and_lose_nothing() -> None:
    """A client ahead of the model waits; one behind it is not stepped."""

    async def test() -> None:
        woken: list[None] = []
        talk = Conversation("n", 0, Opus(RATE, FRAME), lambda: woken.append(None), str)
        writer, sound = sphn.OpusStreamWriter(RATE), np.zeros(FRAME, np.float32)
        packets = b"".join(writer.append_pcm(sound) for _ in range(2 * INBOX))
        hearing = asyncio.ensure_future(talk.hear(packets))
        await asyncio.sleep(0.05)
        assert not hearing.done() and len(talk._inbox) == INBOX
        for _ in range(OUTBOX):
            assert talk.ready
            talk.take()
            talk.answer(Answer(sound, 5))
            await asyncio.sleep(0)
        assert not talk.ready and talk._inbox, "there is no room for an answer"
        assert b"\x025" in await talk.messages()
        assert talk.ready
        talk.take()
        assert not talk.answer(None), "the model has nothing to say yet"
        await hearing
        assert len(woken) > 2 * INBOX

    run(test())


def test_late_is_what_comes_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that were sent ahead are due at the pace of speech."""
    now = [100.0]
    monkeypatch.setattr("ttt_cache.serving.conversation.time.monotonic", lambda: now[0])

    async def test() -> None:
        talk = Conversation("n", 0, Opus(RATE, FRAME), lambda: None, str)
        late = []
        for _ in range(4):
            talk._inbox.append((np.zeros(FRAME, np.float32), 100.0))
        for at in (100.05, 100.15, 100.30, 100.37):  # due at .08, .16, .24, and .38
            now[0] = at
            talk.take()
            late.append(talk.answer(None))
        assert late == [False, False, True, False]

    run(test())


def test_a_hundred_clients_that_send_anything(models: Models, speech: np.ndarray) -> None:
    """Valid, truncated, altered and random messages, cut off anywhere: one that talks is heard."""
    chance, writer = random.Random(0), sphn.OpusStreamWriter(RATE)
    packets = [b"\x01" + writer.append_pcm(frame) for frame in np.split(speech, LENGTH)]

    def anything() -> bytes:
        message = bytearray(chance.choice(packets))
        does = chance.randrange(4)
        if does == 1:
            message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)
        elif does == 2:
            del message[chance.randrange(len(message)) :]
        elif does == 3:
            message = bytearray(chance.randbytes(chance.randrange(100)))
        return bytes(message)

    async def send(server: Served) -> None:
        async with connected(server.url()) as client:
            with contextlib.suppress(ConnectionError):
                for _ in range(chance.randrange(8)):
                    await client.socket.send_bytes(anything())
            if chance.random() < 0.5 and (connection := client.socket._response.connection):
                connection.transport.abort()

    async def test() -> None:
        async with served(models, 4) as server, connected(server.url()) as good:
            for _ in range(34):
                await asyncio.gather(*(send(server) for _ in range(3)))
                await until(lambda: server.engine.free == 3)
            await good.say(speech)
            await good.hear(LENGTH - 1)

    run(test())


@given(data=st.data())
@settings(max_examples=40)
def test_whatever_bytes_come_are_frames_or_malformed(data: Any) -> None:
    """Truncated, altered, repeated, cut anywhere: never another error, never a part of a frame."""
    codec, writer = Opus(RATE, FRAME), sphn.OpusStreamWriter(RATE)
    sound = np.random.default_rng(0).normal(0, 0.1, FRAME).astype(np.float32)
    stream = bytearray(b"".join(writer.append_pcm(sound) for _ in range(5)))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(stream) - 1))
        stream[place : place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    whole = bytes(stream)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    try:
        for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
            for frame in decoded(codec, whole[start:end]):
                assert frame.shape == (FRAME,) and frame.dtype == np.float32
    except MalformedError as error:
        assert "Ogg/Opus" in str(error)
