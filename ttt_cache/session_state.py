"""What a running conversation consists of, and where each of its rows lies.

Moshi keeps it in one state per module, of types that hold graphs and callbacks beside tensors. Each
type is listed here with the axis of its rows: one that is not, or that has grown a field, is
refused by name, since a guess would lose part of a conversation in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from moshi.models.lm import LMGen
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention
from torch import Tensor, nn

from .patched import PatchedState


@dataclass(frozen=True)
class Layout:
    """Where a type of state keeps its conversations.

    Attributes:
        rows: axis of the rows by attribute; one that is `None` is not in use.
        counters: Python integers of the batch as a whole.
        others: what holds nothing of a conversation: constants, graphs, callbacks.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    counters: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def known(self) -> set[str]:
        """The fields of the state that this layout knows."""
        named = {name.split(".")[0] for name in (*self.rows, *self.counters, *self.others)}
        return named | {"batch_size", "device"}


LAYOUTS = {
    "moshi.modules.streaming.State": Layout(),
    "moshi.models.lm._LMGenState": Layout(
        {
            "cache": 0,
            "offsets": 0,
            "condition_sum": 0,
            "condition_cross": 0,
            "cfg_is_masked_until": 0,
        },
        counters=("offset_cpu",),
        others=(
            "initial",
            "graphed_main",
            "graphed_depth",
            "exit_stack",
            "reset_callback",
            "set_exec_mask_callback",
        ),
    ),
    "moshi.modules.transformer._MHAState": Layout(
        {"kv_cache.cache": 1, "kv_cache.end_offset": 0, "offset": 0, "k_cross": 0, "v_cross": 0},
        counters=("offset_cpu",),
    ),
    "moshi.modules.transformer._LayerState": Layout(counters=("offset_cpu",)),
    "moshi.modules.transformer._TransformerState": Layout({"offsets": 0}),
    "moshi.modules.conv._StreamingConv1dState": Layout({"previous": 0, "first": 0}),
    "moshi.modules.conv._StreamingConvTr1dState": Layout({"partial": 0}),
    "moshi.models.compression._MimiState": Layout(
        others=("graphed_tr_enc", "graphed_tr_dec", "graphed_encoder", "graphed_decoder")
    ),
    "ttt_cache.patched.PatchedState": Layout(others=("cache",)),  # by CacheState.tensors()
}


@dataclass(frozen=True)
class Held:
    """A tensor of the running state.

    Attributes:
        tensor: restoring writes into it, so that whatever captured it goes on with what it holds.
        axis: of its rows.
        attach: puts it into the state, where it is not there yet.
    """

    tensor: Tensor
    axis: int
    attach: Callable[[], object] | None = None

    def copies(self, batch: int) -> int:
        """Rows for each conversation: 2 under classifier-free guidance, row i and row i + batch;
        0 where one row serves them all, as a condition may."""
        size = self.tensor.shape[self.axis]
        return 0 if size == 1 < batch else size // batch

    def index(self, batch: int, rows: Sequence[int]) -> list[int]:
        """Where the given conversations lie along the axis; empty where they share one row."""
        return [row + batch * copy for copy in range(self.copies(batch)) for row in rows]


@dataclass(frozen=True)
class Running:
    """Everything that a running batch remembers, by the names that it has in a session file.

    Attributes:
        batch: conversations.
        rows: tensors with a row for each of them.
        counters: Python integers of the whole batch, with the state that holds each.
    """

    batch: int
    rows: dict[str, Held]
    counters: dict[str, tuple[State, str]]

    def counts(self) -> dict[str, int]:
        """The counters as they are."""
        return {name: getattr(state, key) for name, (state, key) in self.counters.items()}


@torch.no_grad()
def running(gen: LMGen, mimi: StreamingModule | None) -> Running:
    """The state of LMGen, of its language model and of Mimi, if given; all must be streaming.

    Raises:
        RuntimeError: part of it is of a type, or has a field, that is not known here.
    """
    state = gen._streaming_state
    assert state is not None
    found = Running(state.batch_size, {}, {})
    parts: list[tuple[str, nn.Module | None]] = [("gen", gen), ("mimi", mimi)]
    for part, root in parts:
        if root is None:
            continue
        # Not `get_streaming_state`: it stops at the language model, which LMGen streams by itself.
        for path, module in root.named_modules(prefix=part):
            if isinstance(module, StreamingModule) and module._streaming_state is not None:
                _collect(path, module._streaming_state, found)
                if isinstance(module, StreamingMultiheadAttention) and module.cross_attention:
                    _cross_attention(path, module, state.condition_cross, found)
    return found


def _collect(path: str, state: State, found: Running) -> None:
    layout = _layout(path, state)
    found.rows[f"{path}.exec_mask"] = Held(state.exec_mask, 0)
    for name, axis in layout.rows.items():
        value: Any = state
        for step in name.split("."):
            value = getattr(value, step, None)
        if value is not None:
            found.rows[f"{path}.{name}"] = Held(value, axis)
    for name, tensor in _cache_of(state):
        found.rows[f"{path}.{name}"] = Held(tensor, 0)
    for name in layout.counters:
        found.counters[f"{path}.{name}"] = (state, name)


def _layout(path: str, state: State) -> Layout:
    kind = f"{type(state).__module__}.{type(state).__qualname__}"
    layout = LAYOUTS.get(kind)
    if layout is None:
        raise RuntimeError(
            f"{path} has a streaming state of the type {kind}, which sessions do not know"
        )
    if unknown := sorted({f.name for f in fields(state)} - layout.known):
        raise RuntimeError(
            f"{path}: the streaming state {kind} has a field {unknown[0]!r} that sessions do not "
            "know: it comes from another version of moshi"
        )
    ring = getattr(state, "kv_cache", None)
    if ring is not None and type(ring) is not RingKVCache:
        raise RuntimeError(
            f"{path} keeps its keys in a {type(ring).__name__}, which sessions do not know"
        )
    return layout


def _cache_of(state: State) -> Iterator[tuple[str, Tensor]]:
    return state.cache.tensors() if isinstance(state, PatchedState) else iter(())


def _cross_attention(
    path: str, attention: StreamingMultiheadAttention, source: Tensor | None, found: Running
) -> None:
    """Keys and values that the first step would make of the conditions and keep.

    Made here where there has been none, so that a session taken or restored before it has them too.
    """
    state = attention._streaming_state
    if state is None or state.k_cross is not None or source is None:
        return
    if attention.cache_cross_attention:
        made = attention._compute_cross_attention(source, source)
        for name, tensor in zip(("k_cross", "v_cross"), made, strict=True):
            held = Held(tensor, 0, lambda name=name, tensor=tensor: setattr(state, name, tensor))
            found.rows[f"{path}.{name}"] = held
