"""One long conversation with both models, frame by frame, timed and weighed as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from moshi.models.lm import LMGen, LMModel
from moshi.utils.compile import no_compile
from torch import Tensor

from ttt_cache.report import state_bytes

SAMPLE_EVERY = 100  # frames between two looks at the size of the states


@dataclass
class Arm:
    """One model, its generator and what was measured on it.

    Attributes:
        seconds: duration of every step.
        state_bytes: size of the temporal transformer's streaming state at each sample.
        texts: the text token of every frame, int64 [1] each.
    """

    model: LMModel
    seconds: np.ndarray
    state_bytes: list[int] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = LMGen(self.model, on_text_hook=self.texts.append)

    def step(self, frame: int, codes: Tensor, depformer: bool, seed: int) -> None:
        """Hear one frame of codes [1, 8, 1] and answer it."""
        torch.manual_seed(seed + frame)  # both arms draw the same numbers
        _wait(codes.device)
        start = time.perf_counter()
        self.generator.step(codes, None if depformer else codes)
        _wait(codes.device)
        self.seconds[frame] = time.perf_counter() - start

    def weigh(self) -> None:
        """Measure the state of the conversation on its tensors."""
        self.state_bytes.append(state_bytes(self.model.transformer.get_streaming_state()))


@dataclass(frozen=True)
class Record:
    """What was measured.

    Attributes:
        sampled: frames that had been heard at each sample of the sizes.
        process_bytes: resident memory of the whole process at each sample; empty where the
            system does not tell.
        agreed: frames from the first one on for which both models chose the same text token.
    """

    frames: int
    sampled: list[int]
    process_bytes: list[int]
    stock: Arm
    patched: Arm
    agreed: int


def converse(
    stock: LMModel,
    patched: LMModel,
    codes: Tensor,
    frames: int,
    seed: int,
    depformer: bool = False,
    on_frame: Callable[[int], None] = lambda done: None,
) -> Record:
    """Step both models through the same frames, in turn, so that noise of the machine hits both.

    Args:
        codes: what is heard, int64 [1, 8, T]; repeated in a loop.
        depformer: let Moshi's second transformer choose the audio tokens. Otherwise they are
            given (the clip's own), and the step is the temporal transformer's, which is patched.
        on_frame: called with the number of frames that are done.
    """
    arms = Arm(stock, np.zeros(frames)), Arm(patched, np.zeros(frames))
    sampled: list[int] = []
    process: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_compile())  # no compiler needed, and no waiting for it
        for arm in arms:
            stack.enter_context(arm.generator.streaming(1))
        for frame in range(frames + 1):
            if frame % SAMPLE_EVERY == 0 or frame == frames:
                sampled.append(frame)
                process.extend(_resident_bytes())
                for arm in arms:
                    arm.weigh()
            if frame < frames:
                heard = codes[:, :, frame % codes.shape[-1], None]
                for arm in arms if frame % 2 == 0 else reversed(arms):
                    arm.step(frame, heard, depformer, seed)
                on_frame(frame + 1)
    return Record(frames, sampled, process, *arms, _agreed(*arms))


def _agreed(stock: Arm, patched: Arm) -> int:
    different = (torch.cat(stock.texts) != torch.cat(patched.texts)).nonzero()
    return int(different[0]) if len(different) else len(stock.texts)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident_bytes() -> list[int]:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # not Linux
        return []
    import resource

    return [int(pages) * resource.getpagesize()]


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run torch on a fixed number of CPU threads, so that step times can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
