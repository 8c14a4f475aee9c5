"""What a conversation costs: bytes per layer, stock and patched, measured on the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from moshi.modules.transformer import StreamingMultiheadAttention
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .backend import Backend
from .checks import whole_number
from .patch import patch_of, require_patch
from .patched import PatchedAttention
from .ready import Ready
from .targets import attention_of, find_transformer


@dataclass(frozen=True)
class LayerReport:
    """One layer's streaming state, in bytes for the whole batch.

    Attributes:
        backend: what answers the steps of a patched layer, `triton` or `reference`, and why that;
            `None` for a stock layer.
    """

    layer: int
    patched: bool
    stock_bytes: int
    patched_bytes: int
    backend: Backend | None = None

    def costs(self) -> tuple[bool, int, int, str]:
        """What layers must share to stand in one line of the table."""
        steps = "Moshi" if self.backend is None else self.backend.name
        return self.patched, self.stock_bytes, self.patched_bytes, steps


@dataclass(frozen=True)
class Report:
    """Streaming state of a model's temporal transformer; `print(report)` shows a table.

    Attributes:
        batch_size: conversations.
        layers: one entry per layer; an unpatched layer costs the same on both sides.
    """

    batch_size: int
    layers: tuple[LayerReport, ...]

    @property
    def stock_bytes(self) -> int:
        """Bytes of all layers without the patch."""
        return sum(layer.stock_bytes for layer in self.layers)

    @property
    def patched_bytes(self) -> int:
        """Bytes of all layers as the model is now."""
        return sum(layer.patched_bytes for layer in self.layers)

    def table(self) -> Table:
        """The report as a rich table, sizes in MB (10^6 bytes)."""
        table = Table(title=f"Streaming state, batch size {self.batch_size} (MB)")
        table.add_column("layer", justify="right")
        for name in ("stock", "patched", "ratio", "steps by"):
            table.add_column(name, justify="right")
        for (patched, stock, now, steps), group in groupby(self.layers, LayerReport.costs):
            layers = [row.layer for row in group]
            label = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}, each"
            table.add_row(label if patched else f"{label} (stock)", *_sizes(stock, now), steps)
        reasons = {str(row.backend) for row in self.layers if row.backend is not None}
        table.caption = "\n".join(sorted(reasons)) or None
        table.add_section()
        table.add_row("total", *_sizes(self.stock_bytes, self.patched_bytes), style="bold")
        return table

    def __str__(self) -> str:
        console = Console(width=60)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def report(model: nn.Module, batch_size: int = 1) -> Report:
    """Print and return what `batch_size` conversations cost, with and without the patch.

    The states are laid out as streaming would lay them out, but as fake tensors: nothing is
    allocated, and a model on the `meta` device (a Moshi 7B before its 15 GB are loaded) works too.

    Args:
        model: as for `ttt_cache.patch`, patched or not.

    Raises:
        TypeError, ValueError: as for `patch`; a layer has no self-attention, or no context to size
            its ring by.
    """
    result = measure(model, batch_size)
    Console().print(result.table())
    return result


def measure(model: nn.Module, batch_size: int = 1) -> Report:
    """What `report` prints."""
    whole_number("batch_size", batch_size, 1)
    transformer = find_transformer(model)
    handle = patch_of(transformer)
    rows = []
    for index in range(len(transformer.layers)):
        if not hasattr(transformer.layers[index], "self_attn"):
            raise ValueError(f"layer {index} has no self-attention (skip_self_attn)")
        attention = attention_of(transformer, index)
        if attention.context is None:
            raise ValueError(f"layer {index} has no context (context=None), its ring has no size")
        stock = state_bytes(_state(attention, StreamingMultiheadAttention, batch_size))
        if handle is None or index not in handle.layers:
            rows.append(LayerReport(index, False, stock, stock))
            continue
        now = _state(attention, PatchedAttention, batch_size)
        rows.append(LayerReport(index, True, stock, state_bytes(now), now.cache.backend))
    return Report(batch_size, tuple(rows))


def summary(model: nn.Module) -> str:
    """One line on a patched model: which layers, what they keep, what a conversation costs."""
    transformer = find_transformer(model)
    caches = require_patch(model).caches
    measured = measure(model)
    windows = sorted({cache.config.window.recent for cache in caches.values()})
    kept = " to ".join(str(n) for n in dict.fromkeys((windows[0], windows[-1])))
    memory = next(iter(caches.values())).config.memory
    device = next(transformer.parameters()).device
    return (
        f"layers {_runs(list(caches))} of {len(transformer.layers)} on {device} keep {kept} frames "
        f"and memory {memory}; state of a conversation {measured.patched_bytes / 1e6:,.2f} MB, "
        f"without the cache {measured.stock_bytes / 1e6:,.2f} MB"
    )


def _runs(layers: list[int]) -> str:
    """Layers as `--layers` reads them: `0-31` or `0,3,25-31`."""
    numbered = enumerate(sorted(layers))  # neighbours differ from their numbers by the same
    runs = [[layer for _, layer in run] for _, run in groupby(numbered, lambda n: n[1] - n[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _state(attention: Any, kind: type[StreamingMultiheadAttention], batch_size: int) -> Any:
    """What streaming would allocate, as fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return kind._init_streaming_state(attention, batch_size)


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a streaming state, found through its attributes and containers.

    What a CPU derives of a state beside it (`ttt_cache.ready`) is no part of it.
    """
    tensors = {id(tensor): tensor for tensor in _tensors(state)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, Ready):
        return
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not callable(value):  # states, not modules or functions
        yield from _tensors(vars(value))


def _sizes(stock: int, patched: int) -> tuple[str, str, str]:
    return f"{stock / 1e6:,.2f}", f"{patched / 1e6:,.2f}", f"{stock / patched:.1f}x"
