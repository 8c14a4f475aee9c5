"""HierarchicalCache: window and memory of one attention layer, without its projections."""

from __future__ import annotations

import math
from operator import attrgetter

import torch
from torch import Tensor, nn

from .attention import Gate
from .backend import choose, parallel_form
from .checks import check_inputs, check_mask, check_state, one_of, whole_number
from .config import GATES, CacheConfig
from .memory import TTT, Attention, QueryReader, VirtualTokens, build_memory, build_reader
from .parallel import extend
from .rotation import Rotation, both_turned, turned
from .state import CacheState, empty_state
from .step import step


class HierarchicalCache(nn.Module):
    """Attention to the last frames exactly and to everything older through a memory.

    Semantics and symbols: `docs/semantics.md`. The parallel form is `cache(q, k, v, x)`, functional
    in the state and differentiable; the streaming form is `cache.stream(q, k, v, x, state)`, in
    place. Both give the same outputs for any split of a sequence into calls.

    Args:
        config: settings of one layer (no per-layer mappings).
        dim: width of the hidden states.
        num_heads: query heads, H.
        head_dim: width of a head, D.
        kv_heads: key heads, a divisor of `num_heads`; `None` means as many.
        rope: `rope(q, k, offset)` turns queries and keys `[B, H, T, D]` to positions
            `offset + 0 .. T - 1`, `offset` int64 `[B]`; Moshi's `RotaryEmbedding` is one. `None`
            for models without rotary positions.
        device, dtype: of the slow weights. Fast weights are float32 or wider.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or the heads do not divide.

    Example:
        >>> cache = HierarchicalCache(CacheConfig(recent=4), dim=32, num_heads=2, head_dim=16)
        >>> q, k, v, x = torch.randn(3, 1, 2, 50, 16).unbind() + (torch.randn(1, 50, 32),)
        >>> y, state = cache(q, k, v, x)
        >>> y.shape
        torch.Size([1, 2, 50, 16])
    """

    anchor: Tensor

    def __init__(
        self,
        config: CacheConfig,
        *,
        dim: int,
        num_heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        rope: Rotation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config must be a CacheConfig, got {config!r}")
        self.config = config
        self.window = config.window
        self.dim = whole_number("dim", dim, 1)
        self.num_heads = whole_number("num_heads", num_heads, 1)
        self.head_dim = whole_number("head_dim", head_dim, 1)
        self.kv_heads = whole_number("kv_heads", num_heads if kv_heads is None else kv_heads, 1)
        if self.num_heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide num_heads={num_heads}, got {kv_heads}")
        self.scale = 1 / math.sqrt(self.head_dim)
        if rope is not None and not callable(rope):
            raise TypeError(f"rope must be callable as rope(q, k, offset) or None, got {rope!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        self.rope = rope
        factory = {"device": device, "dtype": dtype}
        # Follows `.to()`: where and in which dtype a new state lives.
        self.register_buffer("anchor", torch.empty(0, **factory), persistent=False)
        sizes = Attention(self.dim, self.num_heads, self.kv_heads, self.head_dim)
        self.memory = build_memory(config, sizes, **factory)
        self.reader = build_reader(config, sizes, **factory)
        self.gate: Gate | None = None
        if self.reader is not None and self.window.recent:
            kind = one_of("gate", config.gate, GATES)
            bias = self.reader.joint_bias if isinstance(self.reader, VirtualTokens) else 0.0
            self.gate = Gate(kind, self.num_heads, self.head_dim, config.alpha, bias, **factory)
        self.weight_names = [name for name, _ in self.named_parameters()]
        # Shape of every state tensor without its row: what a state given from outside must have.
        shapes = self.empty(1, device="meta")
        self.layout = {name: tensor.shape[1:] for name, tensor in shapes.tensors()}

    def weights(self, part: str) -> dict[str, Tensor]:
        """The slow weights of `memory`, `reader` or `gate`, by their names in the cache.

        By name: where FSDP lets a module run again on the way back, its parameters are plain
        attributes and not registered.
        """
        names = [name for name in self.weight_names if name.startswith(f"{part}.")]
        return {name: attrgetter(name)(self) for name in names}

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CacheState:
        """An empty state for `batch_size` conversations.

        Args:
            device, dtype: of the ring; those of the module by default.

        Raises:
            ValueError: `TTT_CACHE_BACKEND` names no backend, or one that cannot be had.
        """
        state = self.empty(batch_size, device, dtype)
        state.backend = choose(self, state)
        return state

    def empty(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CacheState:
        """The same for the parallel form, where there are no steps for a backend to answer."""
        return empty_state(
            whole_number("batch_size", batch_size, 1),
            self.window,
            (self.kv_heads, self.head_dim),
            self.memory,
            device=device or self.anchor.device,
            dtype=dtype or self.anchor.dtype,
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, state: CacheState | None = None
    ) -> tuple[Tensor, CacheState]:
        """Parallel form: T tokens of every row after `state`.

        Args:
            q: queries before RoPE, `[B, H, T, D]`.
            k, v: keys before RoPE and values, `[B, Hkv, T, D]`.
            x: hidden states that the memory takes in, `[B, T, dim]`.
            state: from an earlier call or `init_state`; `None` starts empty. It is not changed.

        Returns:
            outputs `[B, H, T, D]` and the state after them.

        Raises:
            TypeError: an argument is not a floating-point tensor.
            ValueError: a shape does not fit.
        """
        check_inputs(self, q, k, v, x)
        if state is not None:
            check_state(self, state, q)
        return extend(self, q, k, v, x, state, parallel_form(self, q.device))

    @torch.no_grad()
    def stream(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: CacheState,
        exec_mask: Tensor | None = None,
    ) -> Tensor:
        """Streaming form: T tokens of every row, `state` updated in place, no gradients.

        Args:
            q, k, v, x: as in `forward`.
            state: from `init_state`.
            exec_mask: bool `[B]`; rows where it is False keep their state bit for bit and get an
                output without meaning. `None` means all rows.

        Returns:
            outputs `[B, H, T, D]`.

        Raises:
            TypeError, ValueError: as in `forward`, or the mask or the state does not fit.
        """
        check_inputs(self, q, k, v, x)
        check_state(self, state, q)
        mask = torch.ones_like(state.count, dtype=torch.bool) if exec_mask is None else exec_mask
        check_mask("exec_mask", mask, state.count)
        if q.shape[2] == 1:
            fused = state.backend.fused
            one = step if fused is None else fused.step
            return one(self, q, k, v, x, state, mask)
        y, new = extend(self, q, k, v, x, state, state.backend.form)
        state.commit(new, mask)
        return y

    def rotate(self, q: Tensor, k: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """`q` and `k` turned to positions from `offset` `[B]`; unchanged without a `rope`."""
        return (q, k) if self.rope is None else both_turned(self.rope, q, k, offset)

    def turn(self, x: Tensor, offset: Tensor) -> Tensor:
        """Many tokens of queries or keys `[B, H, T, D]`, likewise."""
        return x if self.rope is None else turned(self.rope, x, offset)

    @property
    def needs_window_output(self) -> bool:
        """Whether the output over window and sinks alone is needed, as such or by the memory."""
        learned = isinstance(self.memory, TTT) and self.memory.source == "output"
        return learned or not isinstance(self.reader, VirtualTokens)

    def written(self, tokens: Tensor) -> Tensor:
        """Whether the n-th token reads the memory; bool, any shape."""
        if self.config.reset_memory:
            return torch.zeros_like(tokens, dtype=torch.bool)
        if isinstance(self.reader, QueryReader) and self.window.arrived:
            return torch.ones_like(tokens, dtype=torch.bool)
        return tokens >= self.window.wait + self.window.chunk

    def mix(self, answered: Tensor, attended: Tensor | None, q: Tensor, tokens: Tensor) -> Tensor:
        """The output where tokens ask the memory themselves.

        Args:
            answered: what the memory adds to each head, `[B, H, T, D]`.
            attended: what the window does; `None` without a window.
            q: queries before RoPE, `[B, H, T, D]`.
            tokens: their numbers, `[B|1, T]`.
        """
        if attended is None or self.gate is None:
            return answered
        written = self.written(tokens)[:, None, None, :, None]
        of_window, of_memory = self.gate.shares(written, self.by_key_head(q))
        out = of_window * self.by_key_head(attended) + of_memory * self.by_key_head(answered)
        return out.flatten(1, 2).to(q.dtype)

    def by_key_head(self, x: Tensor) -> Tensor:
        """Query heads grouped under the key head they share: `[B, Hkv, R, T, D]`."""
        return x.unflatten(1, (self.kv_heads, -1))
