"""State that goes on from one segment of a recording to the next, in training.

A recording of an hour does not fit one backward pass. It is cut into consecutive segments; what a
layer remembers at the end of one, cut from the autograd graph, is where the next begins (truncated
back-propagation through time). Layers without a patch must go on too, so they get a cache that is
stock Moshi at any length: its whole context, no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

from ttt_cache.cache import HierarchicalCache
from ttt_cache.config import CacheConfig
from ttt_cache.patch import Patch, build_cache
from ttt_cache.patched import SLOT, PatchedAttention
from ttt_cache.state import CacheState
from ttt_cache.targets import attention_of, check_layer, refuse_streaming, settings_of_layer

Caches = dict[int, HierarchicalCache]


class Carry:
    """Lets every layer of a patched transformer go on where the last segment stopped.

    Args:
        handle: the patch.
        caches: which cache answers in the patched layers: those of the patch by default, or
            others of the same layers, for controls. Elsewhere full context does.

    Attributes:
        caches: the cache of every layer.
        states: by layer, after the last segment; empty before the first.

    Raises:
        ValueError: a layer cannot go on across segments: sinusoidal positions, or no context.
    """

    def __init__(self, handle: Patch, caches: Caches | None = None) -> None:
        self.handle = handle
        self.caches = full_context(handle) | (handle.caches if caches is None else caches)
        self.states: dict[int, CacheState] = {}
        self._next: dict[int, CacheState] = {}

    @contextmanager
    def segment(self, fresh: Tensor) -> Iterator[None]:
        """Within it, `model(codes)` and its backward pass go on from `states`.

        Every layer reads the state that the last segment left, however often it runs: activation
        checkpointing runs it again in the backward pass. At the end, unless an exception passes,
        the new states are kept.

        Args:
            fresh: bool `[B]`: rows that begin a recording, whose state is erased first.
        """
        refuse_streaming(self.handle.transformer, self.handle.transformer, "trained")
        for state in self.states.values():
            state.reset(fresh)
        self._next = {}
        with self._installed():
            yield
        self.states = self._next

    @contextmanager
    def _installed(self) -> Iterator[None]:
        transformer, own = self.handle.transformer, self.handle.caches
        hooks = []
        try:
            for layer, cache in self.caches.items():
                attention = attention_of(transformer, layer)
                attention.__class__ = PatchedAttention
                attention.add_module(SLOT, cache)
                hooks.append(cache.register_forward_pre_hook(self._give(layer)))
                hooks.append(cache.register_forward_hook(self._take(layer)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in self.caches:
                attention = attention_of(transformer, layer)
                if layer in own:
                    attention.add_module(SLOT, own[layer])
                else:
                    attention.__class__ = StreamingMultiheadAttention
                    delattr(attention, SLOT)

    def _give(self, layer: int) -> Callable[..., tuple[Tensor | CacheState, ...]]:
        def give(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor | CacheState, ...]:
            state = self.states.get(layer)
            return inputs if state is None else (*inputs[:4], state)

        return give

    def _take(self, layer: int) -> Callable[..., None]:
        def take(_: nn.Module, inputs: object, output: tuple[Tensor, CacheState]) -> None:
            self._next[layer] = output[1].detach()

        return take

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the states by name, `[B, ...]`."""
        return {
            f"{layer}.{name}": tensor
            for layer, state in self.states.items()
            for name, tensor in state.tensors()
        }

    def load(self, tensors: Mapping[str, Tensor], batch_size: int) -> None:
        """Go on from what `tensors` gave; none at all is the start.

        Raises:
            ValueError: a tensor is missing or does not fit a layer.
        """
        if not tensors:
            self.states = {}
            return
        empty = {layer: cache.init_state(batch_size) for layer, cache in self.caches.items()}
        self.states = {
            layer: state.filled(
                {
                    name: tensors[f"{layer}.{name}"]
                    for name, _ in state.tensors()
                    if f"{layer}.{name}" in tensors
                }
            )
            for layer, state in empty.items()
        }


def full_context(handle: Patch) -> Caches:
    """For every layer, patched or not, a cache that is stock Moshi at any length."""
    transformer = handle.transformer
    if transformer.positional_embedding in ("sin", "sin_rope"):
        raise ValueError(
            "model must have rotary positions or none to go on across segments, got "
            f"positional_embedding={transformer.positional_embedding!r}"
        )
    stock, caches = CacheConfig(preset="full-context"), {}
    for layer in range(len(transformer.layers)):
        settings = settings_of_layer(stock, transformer, layer)
        if layer not in handle.caches:
            check_layer(transformer, layer, settings)
        caches[layer] = build_cache(transformer, layer, settings)
    return caches


def window_only(handle: Patch) -> Caches | None:
    """A control: windows without a memory; `None` where a layer has no window or no memory.

    Each has as many frames as its layer ever sees exactly: `recent`, and the `chunk - 1` that may
    wait to be evicted. So it is not beaten for want of frames.
    """
    if not _has_both(handle):
        return None
    caches = {}
    for layer, cache in handle.caches.items():
        window = cache.window
        settings = CacheConfig(memory="none", recent=window.capacity, sinks=window.sinks)
        caches[layer] = build_cache(handle.transformer, layer, settings)
    return caches


def memory_reset(handle: Patch) -> Caches | None:
    """A control: the patch, its memory put back to version 0 before every read.

    Such a memory takes no attention mass, so this is the patch without its memory, in the same
    weights and with exactly the same frames. `None` as in `window_only`.
    """
    if not _has_both(handle):
        return None
    caches = {}
    for layer, cache in handle.caches.items():
        settings = replace(cache.config, reset_memory=True)
        caches[layer] = build_cache(handle.transformer, layer, settings)
        caches[layer].load_state_dict(cache.state_dict())
    return caches


def _has_both(handle: Patch) -> bool:
    """Whether every patched layer has a window and a memory."""
    caches = handle.caches.values()
    return all(cache.window.recent and cache.memory is not None for cache in caches)
