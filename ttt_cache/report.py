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

from .checks import whole_number
from .patch import patch_of
from .patched import PatchedAttention
from .targets import attention_of, find_transformer


@dataclass(frozen=True)
class LayerReport:
    """One layer's streaming state, in bytes for the whole batch."""

    layer: int
    patched: bool
    stock_bytes: int
    patched_bytes: int

    def costs(self) -> tuple[bool, int, int]:
        """What layers must share to stand in one line of the table."""
        return self.patched, self.stock_bytes, self.patched_bytes


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
        for name in ("stock", "patched", "ratio"):
            table.add_column(name, justify="right")
        for (patched, stock, now), group in groupby(self.layers, LayerReport.costs):
            layers = [row.layer for row in group]
            label = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}, each"
            table.add_row(label if patched else f"{label} (stock)", *_sizes(stock, now))
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
        stock = _state_bytes(attention, StreamingMultiheadAttention, batch_size)
        patched = handle is not None and index in handle.layers
        now = _state_bytes(attention, PatchedAttention, batch_size) if patched else stock
        rows.append(LayerReport(index, patched, stock, now))
    result = Report(batch_size, tuple(rows))
    Console().print(result.table())
    return result


def _state_bytes(attention: Any, kind: type[StreamingMultiheadAttention], batch_size: int) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return state_bytes(kind._init_streaming_state(attention, batch_size))


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a streaming state, found through its attributes and containers."""
    tensors = {id(tensor): tensor for tensor in _tensors(state)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
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
