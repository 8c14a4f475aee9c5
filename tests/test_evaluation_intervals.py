"""Intervals over files, and the tallies that they are made of."""

import json

import torch

from ttt_cache.evaluation.intervals import bootstrap
from ttt_cache.evaluation.tally import Tally, fine, fine_edges, octave, octave_edges, ratio

VALUES = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mean(weights):
    return weights @ VALUES / weights.sum(1)


def test_a_mean_and_its_normal_interval():
    value, low, high = bootstrap(mean, 40)
    error = VALUES.std(unbiased=False) / 40**0.5
    assert torch.allclose(value, VALUES.mean())
    assert torch.allclose(high - low, 2 * 1.96 * error, rtol=0.1)
    assert low < value < high
    assert [x.tolist() for x in bootstrap(mean, 40)] == [x.tolist() for x in (value, low, high)]
    assert bootstrap(mean, 40, seed=1).low != low


def test_what_is_the_same_in_every_file_is_certain():
    """A ratio of paired figures, however different the files are."""
    twice = bootstrap(lambda w: (w @ (2 * VALUES)) / (w @ VALUES), 40)
    assert torch.allclose(torch.stack(twice), torch.tensor(2.0, dtype=torch.float64))


def test_a_single_file_has_no_interval_and_nothing_no_value():
    figures = bootstrap(lambda w: torch.stack([w @ VALUES[:1], w[:, 0] * torch.nan], dim=1), 1)
    assert figures.rows() == [[float(VALUES[0]), None, None], [None, None, None]]
    json.dumps(figures.rows(), allow_nan=False)
    assert bootstrap(lambda w: w[:, :0], 3).rows() == []  # nothing was asked: no bins


def test_bins_hold_every_number_once():
    numbers = torch.arange(150_000)
    for bin_of, edges_of in ((fine, fine_edges), (octave, octave_edges)):
        bins = bin_of(numbers)
        edges = edges_of(int(bins.max()) + 1)
        assert (edges[bins] <= numbers).all() and (numbers < edges[bins + 1]).all()
    assert torch.equal(fine(numbers[:64]), numbers[:64])
    assert (fine_edges(430).diff() <= (fine_edges(430)[:-1] // 32).clamp_min(1)).all()


def test_tallies_by_hand():
    tally = Tally()
    nan = torch.nan
    tally.add(torch.tensor([[1.0, 2.0, nan]]), torch.tensor([[0, 0, 7]]), fresh=True)
    tally.add(torch.tensor([[4.0]]), torch.tensor([[2]]), fresh=False)
    tally.add(torch.tensor([[1.0], [nan]]), torch.tensor([[0], [1]]), fresh=True)
    assert tally.sums.tolist() == [[3, 0, 4], [1, 0, 0], [0, 0, 0]]
    assert tally.counts.tolist() == [[2, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert ratio(tally.sums, tally.counts)[0, [0, 2]].tolist() == [1.5, 4]
    nothing = Tally()
    nothing.add(torch.tensor([[nan], [nan]]), torch.tensor([[3], [1]]), fresh=True)
    assert (nothing.files, nothing.bins) == (2, 0)
    for one in (tally, nothing, Tally()):
        again = Tally.from_json(json.loads(json.dumps(one.as_json())))
        assert torch.equal(again.sums, one.sums) and torch.equal(again.counts, one.counts)
