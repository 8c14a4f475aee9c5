"""Sound of any length through Mimi, in bounded memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from moshi.modules.conv import StreamingConv1d
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

if TYPE_CHECKING:
    from moshi.models.compression import MimiModel

PIECE = 1250  # frames, 100 s


def history(mimi: MimiModel) -> int | None:
    """Frames before a frame that its codes depend on; `None` if that is all of them.

    Mimi is causal. Each convolution looks back by its kernel, and each transformer layer by its
    context: 80 s in all for the released Mimi, nearly all of it in the transformer.
    """
    back, step = 0, 1  # in samples; step is the distance of two outputs of a layer

    def look_back(convolutions: nn.Module) -> None:
        nonlocal back, step
        for module in convolutions.modules():
            if isinstance(module, StreamingConv1d):
                back += (module._effective_kernel_size - 1) * step
                step *= module._stride

    look_back(mimi.encoder)
    if mimi.encoder_transformer is not None:
        for module in mimi.encoder_transformer.modules():
            if isinstance(module, StreamingMultiheadAttention):
                if module.context is None:
                    return None
                back += (module.context - 1) * step
    if mimi.encoder_frame_rate != mimi.frame_rate:
        look_back(mimi.downsample)
    return math.ceil(back / mimi.frame_size)


@torch.no_grad()
def encode(
    mimi: MimiModel,
    read: Callable[[int, int], np.ndarray],
    samples: int,
    piece: int = PIECE,
) -> Tensor:
    """Encode a recording piece by piece.

    Each piece is encoded behind all the sound that its codes depend on (`history`), which is then
    dropped: the codes are those of the whole recording, up to rounding. So memory goes with a
    piece's length, not the recording's, and long recordings take about twice the time of one pass.
    Mimi's streaming form would give other codes: its ring of keys loses some that are still needed
    when a call brings more than one.

    Args:
        mimi: on any device; the last frame is filled up with silence.
        read: gives `count` samples from sample `start` on, `[C, count]`.
        samples: length of the recording.
        piece: frames that are kept of each pass.

    Returns:
        int32 `[C * num_codebooks, ceil(samples / frame_size)]` on the CPU, channel by channel.
    """
    size, back = mimi.frame_size, history(mimi)
    weight = next(mimi.parameters())
    frames = math.ceil(samples / size)
    if back is None:
        piece, back = frames, 0
    parts = []
    for begin in range(0, frames, piece):
        start, end = max(0, begin - back), min(begin + piece, frames)
        sound = torch.from_numpy(read(start * size, min(end * size, samples) - start * size))
        codes = [mimi.encode(channel[None, None].to(weight)) for channel in sound]
        parts.append(torch.cat(codes)[:, :, begin - start :].int().cpu())
    return torch.cat(parts, dim=2).flatten(0, 1)


def fingerprint(module: nn.Module) -> str:
    """The sha256 of a module's weights: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
