"""One lesson of layer-wise distillation: what full context answers, and how far off a cache is.

The model runs once, unpatched, without gradients. Wherever a patched layer stands, Moshi's own
attention answers; the layer's cache is asked the same, from the same hidden states, and its error
is sent back at once into the cache alone. So nothing is kept from layer to layer, and no gradient
goes through the model. (LoLCATs, arXiv 2410.10254, trains linear attentions layer by layer so.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor

from ttt_cache.patch import Patch
from ttt_cache.patched import PatchedAttention
from ttt_cache.precision import full_precision
from ttt_cache.targets import attention_of, refuse_streaming

Teach = Callable[[PatchedAttention, Tensor, Tensor], None]


class _Taught(PatchedAttention):
    """A patched attention that answers as stock Moshi does and shows its cache the answer."""

    teach: Teach

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = StreamingMultiheadAttention.forward(self, query, key, value)
        self.teach(self, query, answer)
        return answer


class _EnoughError(Exception):
    """Nothing above the last patched layer has to be computed."""


def lesson(
    handle: Patch, run: Callable[[], object], counts: Tensor | None = None
) -> dict[int, Tensor]:
    """Add the gradients of every patched layer's error to its cache's parameters.

    Args:
        run: calls the model once, not streaming.
        counts: bool `[B, T]`, the frames that are not padding; all by default.

    Returns:
        by layer, the squared error of its output relative to that of full context: 0 is equal, 1 as
        bad as silence. Scalars, float32 or wider, averaged over rows.

    Raises:
        RuntimeError: the model is streaming; `run` does not reach the last patched layer.
    """
    refuse_streaming(handle.transformer, handle.transformer, "distilled")
    errors: dict[int, Tensor] = {}
    layers = {id(attention_of(handle.transformer, layer)): layer for layer in handle.layers}
    last = max(handle.layers)

    def teach(attention: PatchedAttention, x: Tensor, answer: Tensor) -> None:
        layer = layers[id(attention)]
        trained = [p for p in attention.ttt_cache.parameters() if p.requires_grad]
        with torch.enable_grad():
            error = relative_error(PatchedAttention.forward(attention, x, x, x), answer, counts)
        if trained:
            # Gradients as they are, also where a caller runs in autocast.
            with full_precision(error):
                error.backward(inputs=trained)
        errors[layer] = error.detach()
        if layer == last:
            raise _EnoughError

    try:
        with torch.no_grad(), _teaching(handle, teach):
            run()
    except _EnoughError:
        return errors
    raise RuntimeError(f"run did not reach layer {last}; it reached {sorted(errors) or 'none'}")


def relative_error(output: Tensor, target: Tensor, counts: Tensor | None = None) -> Tensor:
    """Squared error over squared target, of each row `[T, dim]`, averaged over rows.

    Args:
        counts: bool `[B, T]`, the frames that are looked at; all by default.
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    output, target = output.to(wide), target.detach().to(wide)

    def size(of: Tensor) -> Tensor:
        frames = of.square().sum(2)
        return (frames if counts is None else frames.masked_fill(~counts, 0)).sum(1)

    return (size(output - target) / size(target).clamp_min(torch.finfo(wide).tiny)).mean()


@contextmanager
def _teaching(handle: Patch, teach: Teach) -> Iterator[None]:
    attentions = [attention_of(handle.transformer, layer) for layer in handle.layers]
    try:
        for attention in attentions:
            attention.__class__ = _Taught
            vars(attention)["teach"] = teach
        yield
    finally:
        for attention in attentions:
            attention.__class__ = PatchedAttention
            vars(attention).pop("teach", None)
