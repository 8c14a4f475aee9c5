"""The gradient of a run of chunks, written out: `ttt_cache.memory.delta` backwards.

Read beside `delta.py`. A name `by_x` is the gradient of the outer loss by x. Everything that does
not depend on such a gradient is made for all chunks at once (`again.py`); what goes back chunk by
chunk is what the recurrence of `by_hidden` and `by_last` needs, and what only tokens need of it is
kept for the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .again import Again, Layer
from .delta import Chunk


class Back(NamedTuple):
    """Gradients by what a run was given."""

    chunks: Chunk
    hidden: list[Tensor]
    last: Tensor
    totals: list[Tensor]
    rates: list[Tensor]
    norms: list[Tensor]


class Kept(NamedTuple):
    """What a chunk's gradient leaves for its tokens and for the rule."""

    by_first: Tensor  # z of the first hidden layer, or the keys if there is none
    by_residual: Tensor
    pulled: Tensor  # Phi by_F
    by_delta: list[Tensor]  # of the last hidden layer, if there is one
    fits: list[Tensor]
    dots: list[Tensor]


class Run(Again):
    """The way back through a run of chunks."""

    def back(
        self,
        by_hidden: list[Tensor],
        by_last: Tensor,
        by_end: tuple[list[Tensor], Tensor, list[Tensor]],
    ) -> Back:
        """Args: gradients by what the run made."""
        of_hidden, of_last, by_totals = [w.clone() for w in by_end[0]], by_end[1].clone(), by_end[2]
        left = [torch.empty_like(step.total) for step in self.steps]
        kept: list[Kept] = []
        for i in reversed(range(by_last.shape[0])):
            of_last += by_last[i]
            for of, by in zip(of_hidden, by_hidden, strict=True):
                of += by[i]
            dots, fits = self._unclose(i, of_hidden, of_last, by_totals, [z[i] for z in left])
            by_totals = [z[i] for z in left]
            kept.append(
                self._unlearn(i, of_hidden, of_last, by_totals)._replace(dots=dots, fits=fits)
            )
        kept.reverse()
        rates = [
            -(step.length * torch.stack([k.dots[n] for k in kept])).sum(0)
            for n, step in enumerate(self.steps)
        ]
        norms = [
            (step.inverse * torch.stack([k.fits[n] for k in kept])).sum(0)
            for n, step in enumerate(self.steps)
        ]
        return Back(self._by_tokens(kept, left), of_hidden, of_last, by_totals, rates, norms)

    def _unclose(
        self,
        i: int,
        of_hidden: list[Tensor],
        of_last: Tensor,
        by_totals: list[Tensor],
        left: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`delta.close` backwards: from the weights after it to those before, in place.

        Gradients by the chunk's totals go to `left`.
        """
        full, shrink, pull = (z[i] for z in self.cap)
        dot = (full * of_last).sum((-1, -2), keepdim=True)
        of_last.mul_(shrink).addcmul_(full, pull * dot, value=-1)
        dots, fits = [], []
        for step, of, carried, by_total in zip(self.steps, of_hidden, by_totals, left, strict=True):
            total, size, _, bend, w, scale, _, pull = (z[i] for z in step)
            fits.append((w * of).sum(-2, keepdim=True))
            of.mul_(scale).addcmul_(w, pull * fits[-1], value=-1)
            dots.append((total * of).sum((-1, -2), keepdim=True))
            torch.mul(total, bend * dots[-1], out=by_total)
            by_total.addcmul_(of, size, value=-1).addcmul_(carried, self.open[i])
        return dots, fits

    def _unlearn(
        self, i: int, of_hidden: list[Tensor], of_last: Tensor, by_totals: list[Tensor]
    ) -> Kept:
        """`delta.learn` and `delta.predict` backwards, the weights' gradients in place."""
        layers = [Layer(*(z[i] for z in layer)) for layer in self.layers]
        by_phis, by_zs, by_delta = self._through_gradients(layers, of_hidden, by_totals)
        last, eta, error, rated, later, solve, coupling = (z[i] for z in self.rows)
        phi = self.phi[i]
        pulled = phi @ of_last
        by_error, by_phi = eta * pulled, torch.bmm(rated, of_last.transpose(-1, -2))
        for by in by_delta:
            mixed = by @ phi.transpose(-1, -2) * later
            by_error.baddbmm_(by, last, alpha=-1)
            by_error.baddbmm_(mixed + mixed.transpose(-1, -2), error, alpha=-1)
            by_phi.add_(by_phis[-1]).baddbmm_(coupling, by, alpha=-1)
            of_last.baddbmm_(by.transpose(-1, -2), error, alpha=-1)
        by_residual = solve @ by_error
        mixed = by_residual @ error.transpose(-1, -2) * later
        by_phi.baddbmm_(mixed + mixed.transpose(-1, -2), phi, alpha=-1)
        by_phi.baddbmm_(by_residual, last.transpose(-1, -2), alpha=-1)
        of_last.baddbmm_(phi.transpose(-1, -2), by_residual, alpha=-1)
        by_first = by_phi
        for n in reversed(range(len(layers))):
            layer = layers[n]
            across = (layer.phi * by_phi).sum(-1, keepdim=True)
            by_first = by_zs[n].addcmul_(
                layer.slope, torch.addcmul(by_phi, layer.phi, across, value=-1)
            )
            of_hidden[n].baddbmm_(layer.given.transpose(-1, -2), by_first)
            if n:
                by_phi = by_phis[n - 1].baddbmm_(by_first, layer.weight.transpose(-1, -2))
        return Kept(by_first, by_residual, pulled, by_delta, [], [])

    @staticmethod
    def _through_gradients(
        layers: list[Layer], of_hidden: list[Tensor], by_totals: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """`network.backward` backwards: gradients by phi and z of each layer, by the last delta."""
        by_phis, by_zs, by_delta = [], [], []
        for layer, of, by_total in zip(layers, of_hidden, by_totals, strict=True):
            by_d = torch.bmm(layer.given, by_total)
            for by in by_delta:  # of the layer before
                by_d.baddbmm_(by, layer.weight)
                of.baddbmm_(by.transpose(-1, -2), layer.d)
                by_phis[-1].baddbmm_(layer.d, by_total.transpose(-1, -2))
            by_alpha = by_d * layer.slope
            along = (layer.phi * by_alpha).sum(-1, keepdim=True)
            by_delta = [torch.addcmul(by_alpha, layer.phi, along, value=-1)]
            by_phis.append(-torch.addcmul(by_alpha * layer.along, layer.delta, along))
            by_rho = (by_d * layer.d_by_rho).sum(-1, keepdim=True)
            by_zs.append(by_d * layer.d_by_z - layer.slope * layer.phi * (layer.rho * by_rho))
        return by_phis, by_zs, by_delta

    def _by_tokens(self, kept: list[Kept], left: list[Tensor]) -> Chunk:
        """What gradients by keys, values and rates are made of, for all chunks at once."""
        error, phi = self.rows.error, self.phi
        by_k = torch.stack([k.by_first for k in kept])
        by_v = torch.stack([k.by_residual for k in kept])
        coupled = (by_v @ error.transpose(-1, -2)) * (phi @ phi.transpose(-1, -2))
        if self.layers:
            first = self.layers[0]
            by_k = by_k @ first.weight.transpose(-1, -2) + first.d @ left[0].transpose(-1, -2)
            by_delta = torch.stack([k.by_delta[0] for k in kept])
            more = (by_delta @ phi.transpose(-1, -2)) * (error @ error.transpose(-1, -2))
            coupled = coupled + more
        by_eta = (error * torch.stack([k.pulled for k in kept])).sum(-1, keepdim=True)
        return Chunk(by_k, by_v, by_eta - coupled.tril(-1).sum(-2)[..., None])
