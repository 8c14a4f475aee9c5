"""Where attention goes, beside an oracle that makes every softmax by hand, token by token."""

from __future__ import annotations

import json
import math

import pytest
import torch
from models import SMALL, random_codes, stir, temporal, tiny_lm
from oracle import Oracle
from test_monitor import assert_same, everything

import ttt_cache
from ttt_cache import CacheConfig
from ttt_cache.evaluation.forced import forced
from ttt_cache.evaluation.mass import attention_mass, watched
from ttt_cache.evaluation.source import Piece
from ttt_cache.presets import PRESETS

LENGTH = 30
SPLITS = [7, 13, 10]  # of the length
GATES = ["joint", "fixed", "layer", "head", "query", "residual"]


def pieces_of(codes, lengths=(30,)):
    return [Piece(part, {}) for part in codes.split(list(lengths), dim=2)]


class Weighed(Oracle):
    """An oracle that keeps, of each query that reads the memory, its weights on virtual tokens.

    Where a token asks the memory itself the answer has the one weight.
    """

    def reset(self) -> None:
        super().reset()
        self.kept: dict[int, list[torch.Tensor]] = {}

    def gated(self, head, q, recent, memory):
        config, bias = self.config, self.weights.get("gate.bias")
        bias = None if bias is None else bias[0 if config.gate == "layer" else head]
        one = torch.ones(1, dtype=torch.float64)
        among = one
        if config.read == "virtual":
            among = torch.softmax(self.virtual_tokens(head, q)[0], 0)
        if config.gate == "joint":
            near, far = self.exact_tokens(head, q)[0], self.virtual_tokens(head, q)[0]
            weights = torch.softmax(torch.cat([near, far + bias]), 0)[len(near) :]
        elif config.gate == "fixed":
            weights = (1 - config.alpha) * among
        elif config.gate == "residual":
            weights = torch.tanh(bias).abs() * among
        else:
            logit = bias + (self.weights["gate.weight"][head] @ q if config.gate == "query" else 0)
            weights = torch.sigmoid(-logit) * among
        self.kept.setdefault(head, []).append(weights)
        return super().gated(head, q, recent, memory)


def by_hand(model, handle, layer, codes):
    """Mass, entropy and slots of one layer's heads, and how many queries of each read a memory."""
    calls, cache = [], handle.caches[layer]
    hook = cache.register_forward_hook(lambda _, args, out: calls.append(args[:4]))
    for _ in forced(model, pieces_of(codes), codes.shape[0]):
        pass
    hook.remove()
    (args,) = calls
    heads: dict[int, list[torch.Tensor]] = {}
    for row in range(codes.shape[0]):
        oracle = Weighed(cache)
        for t in range(codes.shape[2]):
            oracle.push(*(z[row, :, t] for z in args[:3]), args[3][row, t])
        for head, weights in oracle.kept.items():
            heads.setdefault(head, []).extend(weights)
    if not heads:
        return 0, [], [], []
    slots = cache.reader.slots if cache.config.read == "virtual" else 1
    whole = []
    for head in sorted(heads):  # clusters without members have no token in the oracle
        rows = [torch.nn.functional.pad(w, (0, slots - len(w))) for w in heads[head]]
        whole.append(torch.stack(rows))
    mass = [float(w.sum(1).mean()) for w in whole]
    shares = [w / w.sum(1, keepdim=True) for w in whole]
    entropy = [float(-torch.xlogy(s, s).sum(1).mean()) for s in shares]
    profile = [(w.sum(0) / w.sum()).tolist() for w in whole]
    return len(whole[0]), mass, entropy, profile


def check(model, handle, codes, lengths):
    found = attention_mass(model, pieces_of(codes, lengths))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for layer in handle.layers:
        queries, mass, entropy, slots = by_hand(model, handle, layer, codes)
        seen = found[str(layer)]
        assert seen["queries"] == queries
        assert seen["mass"] == pytest.approx(mass, rel=1e-4)
        if handle.config.read == "virtual":
            assert seen["virtual"] == handle.caches[layer].reader.slots
            assert seen["entropy"] == pytest.approx(entropy, rel=1e-4, abs=1e-6)
            for one, other in zip(seen["slots"], slots, strict=True):
                assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    return found


@pytest.mark.parametrize(("read", "gate"), [("virtual", g) for g in GATES] + [("query", "layer")])
def test_every_gate_by_hand(read, gate):
    model = tiny_lm(kv_repeat=2)
    handle = ttt_cache.patch(model, layers=[0, 2], read=read, gate=gate, alpha=0.8, **SMALL)
    stir(model)
    found = check(model, handle, random_codes(model, LENGTH), SPLITS)
    assert found["0"]["queries"] == 2 * (LENGTH - 9)  # recent + chunk - 1 read nothing
    assert all(mass > 1e-3 for mass in found["0"]["mass"])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_by_hand(preset):
    model = tiny_lm()
    config = CacheConfig(preset=preset)
    small = SMALL | ({"recent": 0} if config.recent == 0 else {})
    handle = ttt_cache.patch(model, layers=[1], preset=preset, **small)
    stir(model)
    codes = random_codes(model, LENGTH)
    if config.memory == "none":
        assert attention_mass(model, pieces_of(codes)) == {}
    elif config.recent == 0:
        seen = attention_mass(model, pieces_of(codes, SPLITS))["1"]
        assert seen == {"queries": 2 * LENGTH, "mass": [1.0] * 4}
    elif config.reset_memory:
        seen = attention_mass(model, pieces_of(codes))["1"]
        assert (seen["queries"], seen["mass"], seen["entropy"], seen["slots"]) == (0,) + (None,) * 3
    else:
        check(model, handle, codes, SPLITS)


def test_layers_that_share_their_slow_weights():
    model = tiny_lm()
    handle = ttt_cache.patch(model, share=True, **SMALL)
    stir(model)
    found = check(model, handle, random_codes(model, LENGTH), SPLITS)
    assert found["0"]["mass"] != found["1"]["mass"]


def test_one_virtual_token_has_no_entropy_and_equal_ones_the_most():
    model = tiny_lm()
    with ttt_cache.patch(model, **SMALL | {"virtual": 1}):
        stir(model)
        seen = attention_mass(model, pieces_of(random_codes(model, LENGTH)))["0"]
        assert seen["entropy"] == pytest.approx([0] * 4, abs=1e-9)
        assert seen["slots"] == [[1.0]] * 4
    with ttt_cache.patch(model, **SMALL) as handle:
        with torch.no_grad():
            for cache in handle.caches.values():
                cache.reader.to_key.zero_()
        seen = attention_mass(model, pieces_of(random_codes(model, LENGTH)))["0"]
        assert seen["entropy"] == pytest.approx([math.log(3)] * 4)


def test_looking_changes_nothing():
    model = tiny_lm()
    handle = ttt_cache.patch(model, share=True, **SMALL)
    stir(model)
    codes = random_codes(model, LENGTH)
    before, expected = everything(model), temporal(model, codes)
    with watched(handle) as seen:
        assert torch.equal(temporal(model, codes), expected)
    assert seen.result()["0"]["queries"] == 2 * (LENGTH - 9)
    assert_same(before, everything(model))
    with pytest.raises(KeyboardInterrupt), watched(handle):
        raise KeyboardInterrupt
    assert_same(before, everything(model))


def test_refusals():
    model = tiny_lm()
    with pytest.raises(ValueError, match="at least one piece, got none"):
        attention_mass(model, [])
    with pytest.raises(RuntimeError, match="not patched"):
        attention_mass(model, pieces_of(random_codes(model, LENGTH)))
