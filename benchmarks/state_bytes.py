"""What one conversation costs at Moshi 7B's shapes, in bytes of streaming state.

The whole model is laid out on the meta device and `ttt_cache.report` counts its states as fake
tensors. One layer of the same width is then really allocated on the CPU, streamed past its first
evictions, and the bytes of its storages are counted: they must be those of the report.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import DIM, HEADS, environment, publish, quiet_process, transformer
from moshi.models.loaders import get_moshi_lm
from torch import Tensor

import ttt_cache
from ttt_cache.evaluation.lines import Line
from ttt_cache.patched import PatchedState
from ttt_cache.report import Report
from ttt_cache.targets import attention_of

SETTINGS: dict[str, Any] = {"recent": 100, "virtual": 10}
TOP = range(25, 32)
STEPS = 120  # past the first evictions, so that nothing is left to be allocated later
PARTS = {
    "ring (keys, values)": ("keys", "values"),
    "features waiting": ("features",),
    "fast weights": ("memory.w1", "memory.w2"),
    "gradient so far": ("memory.grad1",),
    "read-outs": ("readout",),
    "count": ("count",),
}


def whole_model(batch_size: int) -> tuple[Report, Report, dict[str, Any]]:
    """Reports with all layers patched and with the top seven; the settings in full."""
    model = get_moshi_lm(None, device="meta", dtype=torch.bfloat16)
    with ttt_cache.patch(model, **SETTINGS) as handle:
        every, settings = ttt_cache.report(model, batch_size), asdict(handle.config)
    with ttt_cache.patch(model, layers=TOP, **SETTINGS):
        top = ttt_cache.report(model, batch_size)
    return every, top, settings


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@torch.no_grad()
def one_layer(batch_size: int, seed: int) -> tuple[int, dict[str, int]]:
    """Bytes allocated by one layer of Moshi 7B's width in bf16: stock, and patched by tensor."""
    torch.manual_seed(seed)
    model = transformer(DIM, HEADS, 1, hidden=64, dtype=torch.bfloat16)
    with model.streaming(batch_size):
        state = attention_of(model, 0)._streaming_state
        assert state is not None and state.kv_cache is not None
        ring = state.kv_cache
        stock = storage_bytes([ring.cache, ring.end_offset, state.offset, state.exec_mask])
    ttt_cache.patch(model, **SETTINGS)
    frames = torch.randn(STEPS, batch_size, 1, DIM, dtype=torch.bfloat16)
    with model.streaming(batch_size):
        for frame in frames:
            model(frame)
        state = attention_of(model, 0)._streaming_state
        assert isinstance(state, PatchedState)
        by_tensor = {name: storage_bytes([tensor]) for name, tensor in state.cache.tensors()}
        by_tensor["exec_mask"] = storage_bytes([state.exec_mask])
        together = storage_bytes([*(t for _, t in state.cache.tensors()), state.exec_mask])
    assert together == sum(by_tensor.values()), "tensors of the state share their memory"
    return stock, by_tensor


def lines_of(every: Report, top: Report, stock: int, by_tensor: dict[str, int]) -> list[Line]:
    patched = sum(by_tensor.values())
    reported = every.layers[0]
    lines = [
        Line("stock, 32 layers", every.stock_bytes / 1e6, "MB"),
        Line("patched, all 32 layers", every.patched_bytes / 1e6, "MB", 75.0),
        Line("stock / patched, all layers", every.stock_bytes / every.patched_bytes),
        Line("patched, layers 25-31", top.patched_bytes / 1e6, "MB"),
        Line("stock / patched, layers 25-31", top.stock_bytes / top.patched_bytes),
        Line("one layer, allocated: stock", stock, "bytes"),
        Line("one layer, allocated: patched", patched, "bytes"),
        Line("report's stock layer off by", abs(reported.stock_bytes - stock), "bytes", 0),
        Line("report's patched layer off by", abs(reported.patched_bytes - patched), "bytes", 0),
    ]
    for part, names in PARTS.items():
        lines.append(Line(f"of one layer: {part}", sum(by_tensor[n] for n in names), "bytes"))
    return lines


def main() -> None:
    quiet_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--batch-size", type=int, default=1, help="conversations; targets are for 1"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/state_bytes.json"))
    options = parser.parse_args()
    record = environment(options.seed, "bfloat16")
    every, top, settings = whole_model(options.batch_size)
    stock, by_tensor = one_layer(options.batch_size, options.seed)
    settings["batch_size"] = options.batch_size
    lines = lines_of(every, top, stock, by_tensor)
    publish("state_bytes", options.out, record, settings, lines, by_tensor=by_tensor)


if __name__ == "__main__":
    main()
