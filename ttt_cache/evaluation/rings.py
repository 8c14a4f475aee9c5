"""Plain windows that are only as wide as they have frames: empty room costs as much as full."""

from __future__ import annotations

from ttt_cache.cache import HierarchicalCache
from ttt_cache.config import CacheConfig
from ttt_cache.patch import build_cache
from ttt_cache.state import CacheState
from ttt_cache.training.carry import Caches, Carry

STEP = 1024  # frames by which a window grows


def make_room(carry: Carry, whole: Caches, frames: int, rows: int) -> None:
    """Let windows without a memory hold so many frames, or as many as they ever do.

    Until it is full, a narrower window computes what the wide one does.

    Args:
        carry: has narrow caches, and their states, in the end.
        whole: the caches, by layer, as wide as they are meant.
        frames: of the conversation, with those that come next.
        rows: B.
    """
    caches, states = dict(carry.caches), dict(carry.states)
    for layer, cache in whole.items():
        least = -(-frames // STEP) * STEP
        if cache.memory is not None or cache.window.sinks or cache.window.capacity <= least:
            caches[layer] = cache
        elif caches[layer].window.capacity != least:
            settings = CacheConfig(memory="none", recent=least)
            caches[layer] = build_cache(carry.handle.transformer, layer, settings)
        held = states.get(layer)
        if held is not None and caches[layer] is not carry.caches[layer]:
            states[layer] = _moved(held, caches[layer], rows)
    carry.caches, carry.states = caches, states


def _moved(held: CacheState, cache: HierarchicalCache, rows: int) -> CacheState:
    """The state of a ring that was never full, in a wider one: its tokens fill the first slots."""
    wider = cache.init_state(rows, device=held.keys.device, dtype=held.keys.dtype)
    wider.count = held.count
    for mine, theirs in ((wider.keys, held.keys), (wider.values, held.values)):
        mine[:, :, : theirs.shape[2]] = theirs
    return wider
