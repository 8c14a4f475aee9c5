"""Moshi speaks on its own: LMGen, frame by frame, beside the user's side of a conversation."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from moshi.models.lm import LMGen, LMModel
from moshi.utils.compile import no_compile
from torch import Tensor

from ttt_cache.report import state_bytes
from ttt_cache.targets import refuse_streaming


class Generated(NamedTuple):
    """What came of one piece of the user's side.

    Attributes:
        codes: Moshi's text and codebooks, int64 `[B, 1 + dep_q, S]` on the CPU, not delayed. The
            first piece is shorter by the longest delay, whose frames are not whole yet.
        seconds: of every step, of all rows together, float64 `[steps]`.
        state_bytes: of the temporal transformer's streaming state after the piece.
    """

    codes: Tensor
    seconds: np.ndarray
    state_bytes: int


def generate(
    lm: LMModel,
    heard: Iterable[Tensor],
    rows: int,
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> Generator[Generated, None, None]:
    """Step a model through LMGen, so that stock, patched and partly patched layers all do.

    Frame t is predicted from what the user says up to frame t - 1, as in training: the frame that
    LMGen is given in its first step is one that no model hears.

    Args:
        lm: in eval mode, not streaming.
        heard: pieces of the user's codes, int64 `[B, n_q - dep_q, S]`, S of at least 1.
        rows: conversations at once, B.
        seed: of what is sampled; torch's global generator is left as it was between pieces.
        settings: of LMGen, such as `use_sampling`, `temp_text` or what `CheckpointInfo` has in
            `lm_gen_config`; its own defaults otherwise.

    Yields:
        one result for each piece. The model is streaming until they are exhausted or closed.

    Raises:
        RuntimeError: the model is streaming.
        ValueError: it is in training mode, or a piece does not fit it.
    """
    refuse_streaming(lm, lm.transformer, "run freely")
    if lm.training:
        raise ValueError("lm must be in eval mode, got one in training mode; call lm.eval()")
    generator = LMGen(lm, **(settings or {}))
    sampler = _Sampler(seed, lm.device)
    last = torch.zeros(rows, lm.n_q - lm.dep_q, 1, dtype=torch.long, device=lm.device)
    with generator.streaming(rows):
        for piece in heard:
            _check(lm, piece, rows)
            ahead = torch.cat([last, piece.to(lm.device)], dim=2)
            last = ahead[:, :, -1:]
            with sampler:
                codes, seconds = _run(generator, ahead[:, :, :-1])
            held = state_bytes(lm.transformer.get_streaming_state())
            yield Generated(codes, seconds, held)


def _run(generator: LMGen, heard: Tensor) -> tuple[Tensor, np.ndarray]:
    """Step through one piece: codes `[B, 1 + dep_q, S]` and the seconds of each step."""
    lm, (rows, _, frames) = generator.lm_model, heard.shape
    said: list[Tensor] = []
    seconds = np.zeros(frames)
    on_gpu = lm.device.type == "cuda"
    # On a CPU Moshi's compiled parts would need a compiler and minutes.
    with nullcontext() if on_gpu else no_compile():
        for index, frame in enumerate(heard.split(1, dim=2)):
            start = time.perf_counter()
            codes = generator.step(frame)
            if on_gpu:
                torch.cuda.synchronize(lm.device)
            seconds[index] = time.perf_counter() - start
            if codes is not None:
                said.append(codes)
    empty = torch.zeros(rows, 1 + lm.dep_q, 0, dtype=torch.long)
    return (torch.cat(said, dim=2).cpu() if said else empty), seconds


def milliseconds(seconds: np.ndarray) -> dict[str, float]:
    """Median and 99th percentile of step times."""
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3
    return {"p50": float(p50), "p99": float(p99)}


class _Sampler:
    """Within it torch's generators go on from where they left it last, outside as if it was not."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device, self._seed = device, seed
        self._states: list[Tensor] = []

    def __enter__(self) -> None:
        self._outside = self._generators()
        if self._states:
            self._set(self._states)
        else:
            torch.manual_seed(self._seed)

    def __exit__(self, *exc: object) -> None:
        self._states = self._generators()
        self._set(self._outside)

    def _generators(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)


def _check(lm: LMModel, piece: Tensor, rows: int) -> None:
    wanted = [rows, lm.n_q - lm.dep_q]
    if piece.dim() != 3 or list(piece.shape[:2]) != wanted or piece.shape[2] == 0:
        raise ValueError(
            f"a piece of the user's codes must have shape [{wanted[0]}, {wanted[1]}, S] with S of "
            f"at least 1, got {list(piece.shape)}"
        )
    if piece.numel() and (highest := int(piece.max())) > lm.card:
        raise ValueError(
            f"the user's codes must be at most {lm.card}, the model's card, got {highest}: they "
            "are of another codec or testbed"
        )
