"""Cross-entropy by position, its jump and its slope, computed by hand."""

import json
import math

import pytest
import torch

from ttt_cache.evaluation.crossentropy import (
    CrossEntropy,
    compared,
    drift,
    excess,
    jump,
    slope,
)
from ttt_cache.evaluation.forced import Scores
from ttt_cache.evaluation.positions import has_jump

FILES, FRAMES = 3, 700
WINDOW = 50


def scores(text, start=0, first=None, rest=None):
    """Of `[B, S]` nats; three of Moshi's codebooks."""
    other = torch.ones_like(text)
    choices = torch.zeros(text.shape[0], 4, text.shape[1], dtype=torch.int64)
    given = (other if nats is None else nats for nats in (first, rest))
    return Scores(start, text.float(), *(nats.float() for nats in given), choices)


def heard(nats, pieces=(256, 256, 188), **others):
    """A `CrossEntropy` of `[B, T]` text nats."""
    found, start = CrossEntropy(), 0
    for length in pieces:
        part = slice(start, start + length)
        cut = {name: other[:, part] for name, other in others.items()}
        found.add(scores(nats[:, part], start, **cut))
        start += length
    return found


def noise(seed, files=FILES):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(files, FRAMES, generator=generator, dtype=torch.float64) + 0.5


def near(interval, value):
    assert interval.value == pytest.approx(float(value), rel=1e-5, abs=1e-7)


def test_means_of_any_frames_and_every_measure():
    nats, rest = noise(0), noise(1)
    rest[:, -1] = torch.nan
    found = heard(nats, rest=rest)
    assert (found.files, found.frames) == (FILES, FRAMES)
    near(found.mean(measure="text"), nats.mean())
    near(found.mean(10, 40, "text"), nats[:, 10:40].mean())
    near(found.mean(512, measure="rest"), rest[:, 512:-1].mean())
    near(found.mean(), (nats + 1 + 2 * rest)[:, :-1].mean())
    # Beyond 64 bins hold more frames: spans are widened to whole ones, here of 2, 4 and 16.
    near(found.mean(65, 131, "text"), nats[:, 64:132].mean())
    near(found.mean(513, 520, "text"), nats[:, 512:528].mean())
    near(found.mean(FRAMES - 1, None, "text"), nats[:, 688:].mean())
    for begin, end in ((FRAMES, None), (5, 5), (-1, 8)):
        with pytest.raises(ValueError, match="must be among the 700 heard"):
            found.mean(begin, end)


def test_a_span_far_out_is_the_bins_that_it_is_in():
    """One context of 1,024 at 96 of them, where bins are 2,048 wide."""
    frames, begin, end = 100_000, 95 * 1024, 96 * 1024
    nats = (torch.arange(frames) * 1e-4 + 1).expand(2, -1)
    full, arm = heard(nats, (frames,)), heard(1.1 * nats, (frames,))
    there = nats[:, end - 2048 : end].double()
    near(full.mean(begin, end, "text"), there.mean())
    near(excess(arm, full, begin, end, "text"), 0.1)
    near(full.mean(frames - 1, None, "text"), nats[:, end:].double().mean())
    # One bin that is wholly inside, and the one that the span begins in.
    near(full.mean(begin, end + 2048, "text"), nats[:, end - 2048 :].double().mean())
    assert math.isfinite(slope(full, begin, "text").value)
    # A window's two sides are kept apart instead, and hold at least a bin each.
    louder = nats.clone()
    louder[:, 98_304:] *= 1.5
    near(jump(heard(louder, (frames,)), full, begin, "text"), 0.5)


@pytest.mark.parametrize("window", (0, 257, 259, 260))
def test_no_jump_where_no_bin_is_on_both_sides(window):
    arm = heard(torch.ones(2, 260), (260,))
    assert not has_jump(260, window) and has_jump(260, 256)
    assert "jump" not in arm.result(window)["text"] | compared(arm, arm, window)["text"]
    with pytest.raises(ValueError, match=rf"within 260 frames.*got {window}$"):
        jump(arm, arm, window)


def test_the_result_is_a_table_by_position():
    nats = noise(0)
    result = json.loads(json.dumps(heard(nats).result(WINDOW), allow_nan=False))
    assert (result["files"], result["frames"]) == (FILES, FRAMES)
    assert result["positions"][:2] == [[0, 8], [8, 16]] and result["positions"][-1] == [640, 700]
    for (begin, end), (value, low, high) in zip(
        result["positions"], result["text"]["by_position"], strict=True
    ):
        assert value == pytest.approx(nats[:, begin:end].mean().item(), rel=1e-5)
        assert low <= value <= high
    after, before = nats[:, 50:100].mean(), nats[:, :50].mean()
    assert result["text"]["jump"][0] == pytest.approx(float(after / before - 1), rel=1e-4)
    assert result["first"]["mean"] == [1, 1, 1]
    assert "jump" not in heard(nats).result()["text"]


def test_excess_is_paired():
    """10% everywhere: certain, though files are as different as can be."""
    nats = noise(0) * torch.tensor([[1.0], [10.0], [100.0]])
    one, other = heard(1.1 * nats), heard(nats)
    assert torch.allclose(
        torch.stack(excess(one, other, measure="text")).float(), torch.tensor(0.1)
    )
    low, high = heard(nats).mean(measure="text")[1:]
    assert high > 2 * low


def test_a_jump_is_what_the_window_adds():
    """Conversations that get harder by themselves count for nothing."""
    nats = noise(0)
    nats[:, WINDOW:] *= 3
    full, arm = heard(nats), 1.02 * nats
    arm[:, WINDOW:] *= 1.5
    near(jump(heard(arm), full, WINDOW, "text"), 1.53 - 1.02)
    near(jump(full, full, WINDOW), 0)
    arm = nats.clone()
    arm[:, 2 * WINDOW :] *= 9  # not just beyond the window any more
    near(jump(heard(arm), full, WINDOW, "text"), 0)
    # A wide window: 128 frames on each side.
    arm = nats.clone()
    arm[:, 256:384] *= 2
    near(jump(heard(arm), full, 256, "text"), 1)
    with pytest.raises(ValueError, match="window must end within 700 frames"):
        jump(full, full, FRAMES)


def test_drift_is_a_change_that_the_other_does_not_share():
    nats = noise(0)
    nats[:, 256:384], nats[:, 512:640] = 1, 1.5
    own = heard(nats)
    near(drift(own, (256, 384), (512, 640), measure="text"), 0.5)
    near(drift(own, (256, 384), (512, 640), own, "text"), 0)
    nats[:, 512:640] = 2
    near(drift(heard(nats), (256, 384), (512, 640), own, "text"), 1 / 3)
    with pytest.raises(ValueError, match="frames must be among"):
        drift(own, (0, 64), (FRAMES, FRAMES + 1))


def test_a_slope_is_nats_per_doubling():
    position = torch.arange(FRAMES, dtype=torch.float64).clamp_min(1)
    nats = (2 + 0.3 * position.log2()).expand(FILES, -1)
    line = slope(heard(nats), WINDOW, "text")
    assert line.value == pytest.approx(0.3, abs=1e-3)
    assert math.isclose(line.low, line.high, abs_tol=1e-6)
    near(slope(heard(noise(0)), WINDOW, "first"), 0)


def test_a_shorter_arm_is_compared_as_far_as_it_goes():
    nats = noise(0)
    short = heard(nats[:, :300], (256, 44))
    table = compared(heard(2 * nats), short, WINDOW)
    # Bins are of 8 frames here, and the last one of the shorter is not whole.
    assert table["frames"] == 296 and table["positions"][-1] == [256, 296]
    json.dumps(table, allow_nan=False)
    assert table["text"]["excess"][0] == pytest.approx(1)
    assert table["text"]["jump"][0] == pytest.approx(0, abs=1e-6)
    assert [row[0] for row in table["text"]["by_position"]] == pytest.approx([1] * 17, rel=1e-5)


def test_later_files_are_files_of_their_own():
    nats = noise(0, files=4)
    together, apart = heard(nats), heard(nats[:2])
    for start in (0, 256, 512):
        apart.add(scores(nats[2:, start : min(start + 256, FRAMES)], start))
    assert apart.files == 4
    assert together.as_json() == apart.as_json()


def test_what_was_counted_is_kept():
    found = heard(noise(0), rest=noise(1))
    again = CrossEntropy.from_json(json.loads(json.dumps(found.as_json())))
    assert again.result(WINDOW) == found.result(WINDOW)


def test_other_conversations_are_refused():
    nats = noise(0)
    with pytest.raises(ValueError, match=r"same conversations, got 3 files .* and 2 of"):
        excess(heard(nats), heard(nats[:2]))
    holes = nats.clone()
    holes[0, 5] = torch.nan
    with pytest.raises(ValueError, match="same conversations"):
        compared(heard(nats), heard(holes), WINDOW)
