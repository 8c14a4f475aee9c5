"""Stage 0: each layer's memory learns what full-context attention would have answered."""

import copy

import pytest
import torch
from data_support import random_sessions
from models import SMALL, random_codes, tiny_lm
from moshi.modules.transformer import StreamingMultiheadAttention

import ttt_cache
from ttt_cache.patch import require_patch
from ttt_cache.targets import attention_of
from ttt_cache.training.data import LMFacts, SegmentStream
from ttt_cache.training.lesson import lesson, relative_error
from ttt_cache.training.loss import predict

LENGTH = 40


def patched(**settings):
    model = tiny_lm()
    torch.manual_seed(3)
    ttt_cache.patch(model, layers=[0, 2], **SMALL, **settings)
    return model


def test_a_lesson_is_the_error_against_stock_and_its_gradient():
    """Independently: hidden states and answers by hooks on the stock model, autograd on each."""
    model = patched()
    stock = tiny_lm()
    codes = random_codes(model, LENGTH)
    seen = {}
    for layer in (0, 2):
        attention_of(stock.transformer, layer).register_forward_hook(
            lambda module, args, out, layer=layer: seen.update({layer: (args[0], out)})
        )
    stock(codes)
    expected, gradients = {}, {}
    for layer, (x, target) in seen.items():
        out = attention_of(model.transformer, layer)(x.detach(), x.detach(), x.detach())
        rows = [
            (out[i] - target[i]).square().sum() / target[i].square().sum() for i in range(len(x))
        ]
        expected[layer] = sum(rows) / len(rows)
        parameters = list(attention_of(model.transformer, layer).ttt_cache.parameters())
        gradients[layer] = torch.autograd.grad(expected[layer], parameters, allow_unused=True)
    handle = require_patch(model)
    errors = lesson(handle, lambda: model(codes))
    assert errors.keys() == expected.keys()
    for layer, error in errors.items():
        assert torch.allclose(error, expected[layer], rtol=1e-5)
        mine = [p.grad for p in handle.caches[layer].parameters()]
        for got, wanted in zip(mine, gradients[layer], strict=True):
            assert (got is None) == (wanted is None)
            if wanted is not None:
                assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-7)
    caches = {id(p) for p in ttt_cache.adapter_parameters(model)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in caches)


def test_distilling_lowers_the_error_and_changes_only_the_memory():
    model = patched()
    before = copy.deepcopy(model.state_dict())
    codes = random_codes(model, LENGTH)
    done = ttt_cache.distill(model, [(codes,)] * 40, progress=False)
    assert set(done.errors) == {0, 2}
    for errors in done.errors.values():
        assert len(errors) == 40 and errors[-1] < 0.8 * errors[0]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(".ttt_cache." in name for name in changed)
    assert "layer 0: error" in str(done)
    assert all(p.grad is None for p in model.parameters())


def test_the_layers_above_the_last_patched_one_are_not_run():
    model = tiny_lm()
    ttt_cache.patch(model, layers=[1], **SMALL)
    ran = []
    for layer in range(3):
        model.transformer.layers[layer].self_attn.register_forward_hook(
            lambda *_, layer=layer: ran.append(layer)
        )
    ttt_cache.distill(model, [(random_codes(model, LENGTH),)], progress=False)
    assert ran == [0]  # layer 1 leaves before its hook
    model(random_codes(model, 4))
    assert ran == [0, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_return_to_the_dtype_of_the_model(dtype):
    model = tiny_lm().to(dtype)
    ttt_cache.patch(model, layers=[0], **SMALL)
    before = [(p.dtype, p.detach().clone()) for p in ttt_cache.adapter_parameters(model)]
    batch = (random_codes(model, LENGTH),)
    done = ttt_cache.distill(model, [batch] * 20, lr=1e-2, progress=False)
    assert done.errors[0][-1] < done.errors[0][0]
    after = ttt_cache.adapter_parameters(model)
    assert [p.dtype for p in after] == [dtype for dtype, _ in before]
    assert any(not torch.equal(p, old) for p, (_, old) in zip(after, before, strict=True))


def test_shared_weights_learn_from_every_layer():
    model = patched(share=True)
    handle = require_patch(model)
    codes = random_codes(model, LENGTH)
    lesson(handle, lambda: model(codes))
    together = handle.caches[0].memory.project.grad.clone()
    assert handle.caches[2].memory.project.grad is handle.caches[0].memory.project.grad
    handle.caches[0].zero_grad()
    done = ttt_cache.distill(model, [(codes,)] * 3, progress=False)
    assert together.abs().max() > 0 and set(done.errors) == {0, 2}


def test_relative_error_by_hand():
    target = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    output = torch.tensor([[[3.0, 0.0]], [[1.0, 2.0]]])
    assert relative_error(output, target) == pytest.approx((16 / 25 + 4) / 2)
    longer = [torch.cat([z, torch.full_like(z, float("inf"))], dim=1) for z in (output, target)]
    counts = torch.tensor([[True, False]] * 2)
    assert relative_error(*longer, counts) == pytest.approx((16 / 25 + 4) / 2)


def gradients(model):
    return [p.grad for p in ttt_cache.adapter_parameters(model) if p.grad is not None]


def test_padding_at_the_end_of_a_session_teaches_nothing():
    real, facts = 30, LMFacts.of(tiny_lm())
    stream = SegmentStream(random_sessions([real, real - 7]), facts, total_rows=2)
    padded = stream.next_batch(LENGTH + 20).codes
    # The shorter row alone, the longer row alone: the mean of both is the padded batch's.
    alone = [padded[i : i + 1, :, : length + 1] for i, length in enumerate((real, real - 7))]
    expected, wanted = [], []
    for codes in alone:
        model = patched()
        expected.append(lesson(require_patch(model), lambda m=model, c=codes: predict(m, c)))
        wanted.append(gradients(model))
    model = patched()
    errors = lesson(require_patch(model), lambda: predict(model, padded), facts.counts(padded))
    for layer, error in errors.items():
        assert torch.allclose(error, (expected[0][layer] + expected[1][layer]) / 2, rtol=1e-5)
    for got, one, other in zip(gradients(model), *wanted, strict=True):
        assert torch.allclose(got, (one + other) / 2, rtol=1e-4, atol=1e-7)


def test_frames_of_zero_tokens_are_padding():
    codes = random_codes(patched(), LENGTH)
    zeros = torch.full_like(codes, tiny_lm().zero_token_id)
    found = []
    for batch in (codes, torch.cat([codes, zeros[:, :, :20]], dim=2)):
        model = patched()
        done = ttt_cache.distill(model, [(batch,)] * 3, progress=False)
        found.append([done.errors[layer] for layer in (0, 2)])
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


@pytest.mark.parametrize(
    ("batches", "settings", "error", "words"),
    [
        ([], {}, ValueError, "batches must hold at least one batch"),
        (iter([]), {}, TypeError, "steps must be given"),
        (iter([]), {"steps": 3}, ValueError, "batches must hold at least one batch"),
        ([torch.zeros(1)], {}, TypeError, "batch 0 is a Tensor"),
        ([()], {"lr": -1.0}, ValueError, "lr must be a number of at least 0, got -1.0"),
        ([()], {"lr": "much"}, TypeError, "lr must be a number"),
        ([()], {"pct_start": 2}, ValueError, r"pct_start must be a number in \[0, 1\]"),
        ([()], {"steps": 0}, ValueError, "steps must be at least 1"),
        ([()] * 2, {"steps": 50}, ValueError, "steps must be at most the 2 batches .* got 50"),
        ([()], {"max_norm": float("nan")}, ValueError, "max_norm must be a number"),
        ([()], {"progress": 1}, TypeError, "progress must be True or False"),
    ],
)
def test_refusals_change_nothing(batches, settings, error, words):
    model = patched()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        ttt_cache.distill(model, batches, **({"progress": False} | settings))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_cannot_be_distilled():
    model = tiny_lm()
    batch = (random_codes(model, 8),)
    with pytest.raises(RuntimeError, match="model is not patched"):
        ttt_cache.distill(model, [batch])
    with (
        ttt_cache.patch(model, preset="window", recent=4),
        pytest.raises(ValueError, match="nothing to train: memory='none'"),
    ):
        ttt_cache.distill(model, [batch])
    ttt_cache.patch(model, **SMALL)
    with (
        model.streaming(2),
        pytest.raises(RuntimeError, match="cannot be distilled while it is streaming"),
    ):
        ttt_cache.distill(model, [batch], progress=False)


def test_an_error_that_is_not_finite_stops_before_the_step():
    model = patched()
    before = [p.detach().clone() for p in ttt_cache.adapter_parameters(model)]
    with torch.no_grad():
        model.text_emb.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="step 0: the error of layer 0 is nan"):
        ttt_cache.distill(model, [(random_codes(model, LENGTH),)], progress=False)
    for old, new in zip(before, ttt_cache.adapter_parameters(model), strict=True):
        assert torch.equal(old, new) and new.grad is None


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    model = patched()
    before = [p.detach().clone() for p in ttt_cache.adapter_parameters(model)]
    require_patch(model).caches[2].memory.project.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(RuntimeError, match="step 0: the norm of the gradient is"):
        ttt_cache.distill(model, [(random_codes(model, LENGTH),)], progress=False)
    for old, new in zip(before, ttt_cache.adapter_parameters(model), strict=True):
        assert torch.equal(old, new) and new.grad is None


def test_sequences_that_never_leave_the_window_are_no_success():
    model = patched()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"well beyond recent \+ chunk"):
        ttt_cache.distill(model, [(random_codes(model, 9),)] * 2, progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_batches_that_run_out_are_told():
    model = patched()
    batches = iter([(random_codes(model, LENGTH),)] * 2)
    with pytest.warns(RuntimeWarning, match="ran out after 2 of 50 steps"):
        done = ttt_cache.distill(model, batches, steps=50, progress=False)
    assert len(done.errors[0]) == 2


def test_an_interrupted_lesson_leaves_a_patched_model():
    model = patched()
    codes = random_codes(model, LENGTH)
    expected = model(codes).text_logits

    def run():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lesson(require_patch(model), run)
    assert torch.equal(model(codes).text_logits.nan_to_num(), expected.nan_to_num())
    with pytest.raises(RuntimeError, match="run did not reach layer 2; it reached none"):
        lesson(require_patch(model), lambda: None)
    assert isinstance(attention_of(model.transformer, 0), StreamingMultiheadAttention)
