"""Sound as plain samples, which browsers send: `?codec=pcm`."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_files import FRAME, RATE
from serving_support import LENGTH, closed, connected, decoded, refused, run, served

from ttt_cache.serving.errors import MalformedError
from ttt_cache.serving.pcm import Pcm


def as_pcm(sound: np.ndarray) -> bytes:
    return (sound.clip(-1, 1) * 32767).astype("<i2").tobytes()


@given(st.lists(st.integers(0, 3 * FRAME), max_size=6), st.randoms(use_true_random=False))
def test_samples_come_out_whole_frames_however_they_were_cut(cuts: list[int], chance) -> None:
    total = sum(cuts)
    sound = np.array([chance.randint(-32767, 32767) for _ in range(total)], "<i2")
    codec, frames = Pcm(RATE, FRAME), []
    for part in np.split(sound, np.cumsum(cuts)[:-1]) if cuts else []:
        frames += decoded(codec, part.tobytes())
    assert len(frames) == total // FRAME
    back = b"".join(asyncio.run(codec.encode(frame)) for frame in frames)
    assert back == sound.tobytes()[: len(back)]


def test_half_a_sample_is_malformed_and_what_is_too_loud_is_cut_off() -> None:
    with pytest.raises(MalformedError, match="2 bytes each, got 3 bytes"):
        decoded(Pcm(RATE, FRAME), b"abc")
    loud = asyncio.run(Pcm(RATE, 2).encode(np.array([-7, 7], np.float32)))
    assert np.frombuffer(loud, "<i2").tolist() == [-32767, 32767]


def test_a_conversation_in_samples(models, heard) -> None:
    """It is told what it is about, and gets as many samples as it sent, less the model's delay."""

    async def test() -> None:
        async with served(models, 2) as server:
            assert (await refused(server.url("/api/chat?codec=mp3")))[0] == 400
            async with connected(server.url("/api/chat?codec=pcm&session=new")) as client:
                told = json.loads((await client.socket.receive_bytes())[1:])
                assert told == {
                    "session": client.session,
                    "frames": 0,
                    "state_bytes": server.engine.state_bytes() // 2,
                }
                for half in np.split(heard[0], 2):  # of a message that would be too large
                    await client.socket.send_bytes(b"\x01" + as_pcm(half))
                said = b""
                while len(said) < (LENGTH - 1) * FRAME * 2:
                    message = await client.socket.receive_bytes()
                    said += message[1:] if message[0] == 1 else b""
                assert len(said) == (LENGTH - 1) * FRAME * 2 and np.frombuffer(said, "<i2").any()
            async with connected(server.url("/api/chat?codec=pcm")) as client:
                await client.socket.send_bytes(b"\x01abc")
                assert await closed(client) == 1007

    run(test())
