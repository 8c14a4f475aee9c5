"""The kernels on a GPU: their errors against float64, and the decode kernel's share of bandwidth.

A budget of error is twice what the reference loses in the kernel's own dtype, plus a rounding.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from core import worst
from moshi.modules.rope import RotaryEmbedding
from torch import Tensor

from ttt_cache.bench.core import Core, Place
from ttt_cache.bench.timing import Cold, gpu_span
from ttt_cache.fused import absorbed, gate_of, layer_of, memory_of, reader_of, ring_of
from ttt_cache.kernels import reference
from ttt_cache.kernels.inputs import Gate, Layer, Ring, Token, Virtual
from ttt_cache.kernels.memory_reference import MemoryWeights
from ttt_cache.kernels.memory_reference import memory_step as reference_step
from ttt_cache.kernels.rotary import frequencies
from ttt_cache.kernels.workspace import Workspace
from ttt_cache.memory import TTT

SETTINGS: dict[str, Any] = {"recent": 100, "virtual": 10, "chunk": 8}
REPETITIONS = 15
Outputs = tuple[Tensor, Tensor | None]
Decode = Callable[[Token, Ring, Layer, Virtual | None, Workspace], Outputs]
MemoryStep = Callable[..., None]  # as `reference_step`


class Asked(NamedTuple):
    """What a decode kernel is given."""

    token: Token
    ring: Ring
    layer: Layer
    virtual: Virtual
    workspace: Workspace

    def apart(self, dtype: torch.dtype | None = None) -> Asked:
        """A copy, its numbers in another dtype; angles stay as they are."""

        def cast(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(dtype or x.dtype, copy=True) if x.is_floating_point() else x.clone()

        token = Token(*map(cast, self.token))._replace(frequencies=self.token.frequencies)
        gate = Gate(*map(cast, self.virtual.gate))
        latents = self.virtual.readout.clone()
        virtual = Virtual(cast(self.virtual.absorbed), latents, gate)
        return Asked(token, Ring(*map(cast, self.ring)), self.layer, virtual, self.workspace)


def stepped(place: Place, backend: str, steps: int) -> Core:
    """A patched core after some frames, its rows in all phases of a chunk."""
    core, chunk = Core(place, 3000, SETTINGS, backend), SETTINGS["chunk"]
    ahead = torch.arange(place.batch, device=place.device) % chunk
    for step in range(steps):
        core.streaming.exec_mask.copy_(ahead > step if step < chunk - 1 else ahead >= 0)
        hidden, projected = place.frames(1)
        core.step(hidden[0], projected[0])
    return core


@torch.no_grad()
def ask(core: Core) -> Asked:
    """One more token for a core's state."""
    cache, state, place = core.cache, core.state, core.place
    reader = reader_of(cache)
    assert state is not None and reader is not None
    assert isinstance(cache.rope, RotaryEmbedding)
    q, k, v = place.frames(1)[1].view(place.batch, 3, cache.num_heads, cache.head_dim).unbind(1)
    turns = frequencies(cache.head_dim, cache.rope.max_period, place.device)
    token = Token(q, k, v, torch.ones_like(state.count, dtype=torch.bool), turns)
    virtual = Virtual(absorbed(reader, q), state.readout, gate_of(cache))
    ring = ring_of(state)
    space = Workspace.of(ring, cache.num_heads, state.readout.shape[-1])
    return Asked(token, ring, layer_of(cache), virtual, space)


@torch.no_grad()
def decode_error(core: Core, decode: Decode) -> float:
    """The largest error of the decode kernel, as a share of its budget."""
    asked = ask(core)
    wide, narrow, mine = asked.apart(torch.float64), asked.apart(), asked.apart()
    exact, plain = (reference.decode(*one[:4]) for one in (wide, narrow))
    found = decode(*mine)
    shares = [share(f, e, p) for f, e, p in zip(found, exact, plain, strict=True)]
    shares.append(share(mine.ring.keys, wide.ring.keys, narrow.ring.keys))
    return worst(shares)


@torch.no_grad()
def memory_error(core: Core, memory_step: MemoryStep, steps: int) -> float:
    """The largest error of the memory kernel over some steps, as a share of its budget."""
    cache, state = core.cache, core.state
    assert state is not None and isinstance(cache.memory, TTT)
    narrow, found = state.clone(), state.clone()
    wide = state.map(lambda x: x.double() if x.dtype == torch.float32 else x.clone())
    steppers = ((found, memory_step), (wide, reference_step), (narrow, reference_step))
    shares = [0.0]
    for _ in range(steps):
        features = torch.randn(core.place.batch, cache.memory.width, device=state.count.device)
        mask = torch.rand(core.place.batch, device=state.count.device) < 0.8
        for one, step in steppers:
            weights, rows, chunk = memory_of(cache, cache.memory, one)
            weights = _double(weights) if one is wide else weights
            step(features.to(state.features.dtype), one.count, mask, weights, rows, chunk)
            one.count.add_(mask)
        each = zip(found.tensors(), wide.tensors(), narrow.tensors(), strict=True)
        for (name, mine), (_, exact), (_, plain) in each:
            if name == "readout" or name.startswith("memory"):
                shares.append(share(mine, exact, plain))
    return worst(shares)


def _double(weights: MemoryWeights) -> MemoryWeights:
    wide: dict[str, Any] = {
        name: w if w is None else w.double() for name, w in weights._asdict().items()
    }
    return MemoryWeights(**wide)


def share(found: Tensor | None, exact: Tensor | None, plain: Tensor | None) -> float:
    """The largest error as a share of the budget; 0 where there is nothing."""
    if found is None or exact is None or plain is None or not found.numel():
        return 0.0
    eps = torch.finfo(found.dtype).eps * float(exact.abs().max())
    budget = 2 * (float((plain.double() - exact).abs().max()) + eps)
    error = float((found.double() - exact).abs().max())
    return error / budget if budget else error


def bytes_moved(asked: Asked) -> float:
    """What a launch must read and write, on average over the steps of a chunk.

    Of the window all but the token itself, which is at hand; read-outs once.
    """
    token, ring, layer, virtual, _ = asked
    batch, heads, width = token.q.shape
    latent = virtual.readout.shape[-1]
    seen = layer.recent + (layer.chunk - 1) / 2
    pair = 2 * ring.keys.shape[1] * width  # numbers in a token's keys and values
    window = pair * (seen - 1) + 2 * pair  # its own: read as given, stored as kept
    by_head = heads * (2 * width + latent)  # q, what window and virtual tokens bring back
    numbers = batch * (window + by_head) + virtual.absorbed.numel()
    return numbers * token.q.element_size() + virtual.readout.nbytes


class Layers:
    """The decode kernel in many layers, one after the other, as one CUDA graph.

    Each has a ring of its own and all together more than the L2 cache holds, so every launch finds
    it cold, and the time between launches is what it is in a model.
    """

    def __init__(self, core: Core, decode: Decode, l2_bytes: int) -> None:
        first = ask(core)
        self.bytes = bytes_moved(first)
        self.number = min(max(int(4 * l2_bytes / self.bytes) + 1, 8), 128)
        self.asked = [first.apart() for _ in range(self.number)]
        self.graph = torch.cuda.CUDAGraph()
        self._launch(decode)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self._launch(decode)

    def _launch(self, decode: Decode) -> None:
        for one in self.asked:
            decode(*one)

    def bytes_per_second(self, cold: Cold, chunk: int) -> float:
        """Median over samples of a whole chunk of steps."""
        samples = []
        for _ in range(REPETITIONS):
            spans = [gpu_span(self.graph.replay, cold) for _ in range(chunk)]
            torch.cuda.synchronize()
            samples.append(sum(start.elapsed_time(end) for start, end in spans) / chunk)
        return self.number * self.bytes / statistics.median(samples) * 1e3
