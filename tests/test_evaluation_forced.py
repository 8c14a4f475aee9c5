"""Teacher-forced streaming of any length is Moshi's own forward pass, or its streaming."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SMALL, assert_near, random_codes, stir, tiny_lm

import ttt_cache
from ttt_cache.evaluation import rings
from ttt_cache.evaluation.forced import Forcing, forced
from ttt_cache.evaluation.source import Piece

ARMS = {
    "wide": {"memory": "none", "recent": 1000},
    "ttt-mlp": SMALL,
    "one layer": {**SMALL, "layers": [1]},
}


def patched(arm, **changes):
    model = tiny_lm(**changes)
    torch.manual_seed(3)
    ttt_cache.patch(model, **ARMS[arm])
    stir(model)
    return model


def pieces_of(codes, lengths):
    """With marks that say which frame is which."""
    frames = torch.arange(codes.shape[2]).expand(codes.shape[0], -1)
    cuts = zip(codes.split(lengths, dim=2), frames.split(lengths, dim=1), strict=True)
    return [Piece(part, {"frame": frame}) for part, frame in cuts]


@torch.no_grad()
def whole(model, codes):
    """Nats and choices of all of Moshi's streams, from one forward pass."""
    out = model(codes)
    nats, choices = [], []
    for stream in range(1 + model.dep_q):
        text = stream == 0
        logits = out.text_logits[:, 0] if text else out.logits[:, stream - 1]
        mask = out.text_mask[:, 0] if text else out.mask[:, stream - 1]
        each = F.cross_entropy(
            logits.transpose(1, 2), codes[:, stream].clamp_min(0), reduction="none"
        )
        nats.append(each.masked_fill(~mask, torch.nan))
        choices.append(logits.nan_to_num(0).argmax(-1))
    return torch.stack(nats, 1), torch.stack(choices, 1)


def joined(results):
    results = list(results)
    starts = [scores.start for scores, _ in results]
    lengths = [piece.codes.shape[2] for _, piece in results]
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))]
    parts = zip(*(scores[1:] for scores, _ in results), strict=True)
    return [torch.cat(part, dim=-1) for part in parts]


def same(actual, expected):
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_near(actual.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("arm", ARMS)
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), data=st.data())
def test_pieces_of_any_length_are_one_forward_pass(arm, lengths, data):
    model = patched(arm)
    codes = random_codes(model, sum(lengths))
    for stream in range(model.num_codebooks):  # codes that are missing
        gone = data.draw(st.integers(0, sum(lengths) - 1))
        codes[stream % 2, stream, gone : gone + 2] = model.zero_token_id
    nats, choices = whole(model, codes)
    results = list(forced(model, pieces_of(codes, lengths), 2))
    text, first, rest, chosen = joined(results)
    same(text, nats[:, 0])
    same(first, nats[:, 1])
    same(rest, nats[:, 2])
    end = [0, *model.delays[1 : 1 + model.dep_q]]
    for stream, delay in enumerate(end):
        last = sum(lengths) - delay
        assert torch.equal(chosen[:, stream, :last], choices[:, stream, :last])
        assert (chosen[:, stream, max(last, 0) :] == -1).all()
    heard = torch.cat([piece.codes for _, piece in results], dim=2)
    assert torch.equal(heard, codes)
    marks = torch.cat([piece.marks["frame"] for _, piece in results], dim=1)
    assert torch.equal(marks, torch.arange(sum(lengths)).expand(2, -1))


def test_more_codebooks_are_averaged_and_summed():
    model = patched("ttt-mlp", n_q=8, dep_q=4, delays=[0, 0, 1, 2, 1, 0, 1, 1, 1])
    codes = random_codes(model, 30)
    nats, _ = whole(model, codes)
    (scores, _), *more = list(forced(model, pieces_of(codes, [20, 10]), 2))
    done = scores.text.shape[1]
    assert more and done == 18
    assert_near(scores.rest, nats[:, 2:, :done].mean(1))
    assert_near(scores.total, nats[:, :, :done].sum(1))


def test_full_context_is_stock_moshi_streaming_far_beyond_its_ring():
    """Stock layers one frame at a time, where they are right, in their own code."""
    model = tiny_lm(context=16)
    codes = random_codes(model, 70)
    with ttt_cache.patch(model, preset="full-context"):
        text, *_ = joined(forced(model, pieces_of(codes, [31, 39]), 2))
    initial = model._get_initial_token().expand(2, -1, -1)
    delayed = torch.stack(
        [
            torch.cat([initial[:, k].expand(-1, 1 + delay), codes[:, k]], dim=1)[:, :70]
            for k, delay in enumerate(model.delays)
        ],
        dim=1,
    )
    with torch.no_grad(), model.streaming(2):
        logits = torch.cat([model.forward_text(x)[1][:, 0] for x in delayed.split(1, 2)], dim=1)
    expected = F.cross_entropy(logits.transpose(1, 2), codes[:, 0], reduction="none")
    assert_near(text, expected)


@pytest.mark.parametrize("step", [7, 64])
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6))
def test_windows_that_grow_are_as_wide_ones(step, lengths):
    """Windows of 25 and 90, and stock's of 64 in a layer without a patch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rings, "STEP", step)
        model = tiny_lm()
        ttt_cache.patch(model, layers=[0, 2], memory="none", recent={0: 25, 2: 90})
        codes = random_codes(model, sum(lengths))
        forcing, found = Forcing(model, 2), []
        for part in codes.split(lengths, dim=2):
            assert not forcing.fork().feed(part).nats.isinf().any()
            found.append(forcing.feed(part).nats)
            widths = {n: cache.window.capacity for n, cache in forcing.carry.caches.items()}
            room = -(-sum(each.shape[2] for each in found) // step) * step
            assert widths == {n: min(room, most) for n, most in ((0, 25), (1, 64), (2, 90))}
    nats = torch.cat(found, dim=2)
    for stream, delay in enumerate(model.delays[: 1 + model.dep_q]):
        expected = whole(model, codes)[0][:, stream, : max(0, sum(lengths) - delay)]
        same(nats[:, stream, delay:], expected)


@pytest.mark.parametrize("arm", ARMS)
def test_what_is_held_does_not_grow(arm, monkeypatch):
    monkeypatch.setattr(rings, "STEP", 2000)
    model = patched(arm)
    forcing, held = Forcing(model, 2), []
    for codes in random_codes(model, 300).split(60, dim=2):
        forcing.feed(codes)
        tensors = [*forcing.carry.tensors().values(), forcing._delays._past]
        held.append([(t.shape, t.untyped_storage().nbytes()) for t in tensors])
    assert held[0] == held[-1]


def test_a_fork_goes_its_own_way():
    model = patched("ttt-mlp")
    codes, other = random_codes(model, 60), random_codes(model, 60, seed=9)
    forcing = Forcing(model, 2)
    forcing.feed(codes[:, :, :30])
    fork = forcing.fork()
    told = fork.feed(other[:, :, 30:])
    rest = forcing.feed(codes[:, :, 30:])
    turned = torch.cat([codes[:, :, :30], other[:, :, 30:]], dim=2)
    for got, full in ((told, turned), (rest, codes)):
        alone = Forcing(model, 2).feed(full)
        same(got.nats, alone.nats[:, :, 30:])


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_model_that_has_exploded_is_not_measured(first):
    model = patched("ttt-mlp")
    with torch.no_grad():
        for layer in model.transformer.layers[first:]:
            for parameter in layer.parameters():
                parameter.fill_(torch.nan)
    codes = random_codes(model, 20)
    codes[0, 0, 0] = model.zero_token_id  # nothing is lost where there is nothing to predict
    message = "frame 0 of row 1: the cross-entropy of text is nan, it must be finite"
    with pytest.raises(RuntimeError, match=message):
        Forcing(model, 2).feed(codes)
    with pytest.raises(RuntimeError, match=message):
        list(forced(model, pieces_of(codes, [10, 10]), 2))


def test_what_explodes_later_is_named_where_it_does():
    model = patched("ttt-mlp")
    codes = random_codes(model, 40).clamp_max(model.card - 2)
    codes[1, 1, 24] = model.card - 1
    with torch.no_grad():
        model.emb[0].weight[model.card - 1] = torch.nan
    # In pieces that end before it: within one it reaches back, as NaN times a weight of 0 is NaN.
    run = forced(model, pieces_of(codes, [10, 15, 15]), 2)
    for scores in (next(run)[0], next(run)[0]):
        assert scores.total.isfinite().all()
    with pytest.raises(RuntimeError, match="frame 25 of row 1: the cross-entropy of text is nan"):
        next(run)


@pytest.mark.parametrize(("stream", "what"), [(0, "text"), (2, "codebook 2 of Moshi")])
def test_a_code_that_cannot_be_is_infinitely_unlikely(stream, what):
    model = patched("ttt-mlp")
    codes = random_codes(model, 40).clamp_max(model.card - 2)
    never = torch.tensor([model.card - 1])
    layer = model.linears[stream - 1] if stream else model.text_linear
    layer.register_forward_hook(lambda *given: given[2].index_fill(-1, never, -torch.inf))
    assert Forcing(model, 2).feed(codes).there[:, :, 1:].all()
    codes[1, stream, 25] = model.card - 1
    with pytest.raises(
        RuntimeError, match=f"frame 25 of row 1: the cross-entropy of {what} is inf"
    ):
        list(forced(model, pieces_of(codes, [20, 20]), 2))


@pytest.mark.parametrize(("n_q", "dep_q"), [(1, 1), (2, 1), (2, 0)])
def test_models_of_fewer_than_two_codebooks_are_refused(n_q, dep_q):
    model = tiny_lm(n_q=n_q, dep_q=dep_q, delays=[0] * (1 + n_q))
    with pytest.raises(AssertionError):  # Moshi's own
        model(random_codes(model, 5))
    ttt_cache.patch(model, **SMALL)
    with pytest.raises(ValueError, match=f"dep_q must be at least 2 to be scored, got {dep_q}"):
        Forcing(model, 2)


def test_what_does_not_fit_is_refused():
    model = tiny_lm()
    codes = random_codes(model, 10)
    with pytest.raises(RuntimeError, match="not patched"):
        Forcing(model, 2)
    ttt_cache.patch(model, **SMALL)
    with pytest.raises(ValueError, match=r"codes must be \[3, 5\] by frames, got \[2, 5, 10\]"):
        Forcing(model, 3).feed(codes)
    with pytest.raises(ValueError, match=r"got \[2, 4, 10\]"):
        Forcing(model, 2).feed(codes[:, 1:])
    assert list(forced(model, [], 2)) == []


def test_the_model_stays_as_it_was():
    model = patched("one layer")
    before = [type(layer.self_attn) for layer in model.transformer.layers]
    run = forced(model, pieces_of(random_codes(model, 60), [30, 30]), 2)
    next(run)
    assert [type(layer.self_attn) for layer in model.transformer.layers] == before
    assert torch.is_grad_enabled()
