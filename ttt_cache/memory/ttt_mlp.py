"""TTT-MLP: a two-layer network per row, trained by one step of gradient descent per evicted token.

After "Learning to (Learn at Test Time)" (arXiv 2407.04620, section 2) with normalised steps: the
output layer follows the delta rule (arXiv 2406.06484, equation 1; its chunk form is the triangular
solve of section 3 there) on features of unit norm, and the input layer makes one bounded step per
chunk. `docs/semantics.md` has the equations and the argument that the weights stay bounded.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import MemoryState, wide
from .latent import LatentMemory

EPS = 1e-6
LARGEST = 1e15  # of a projected feature: its square still fits float32


def unit(z: Tensor) -> Tensor:
    """`z / |z|` along the last axis, smooth at zero."""
    return z * torch.rsqrt(z.square().sum(-1, keepdim=True) + EPS)


def rms_norm(z: Tensor) -> Tensor:
    """`z` with a root mean square of 1 along the last axis, smooth at zero."""
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)


def gelu(z: Tensor) -> Tensor:
    """GELU in its tanh form, which has the same value in every backend."""
    return F.gelu(z, approximate="tanh")


def gelu_slope(z: Tensor) -> Tensor:
    """Derivative of `gelu`, itself differentiable."""
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)


class FastWeights(nn.Module):
    """Version 0 of the fast weights and the inner learning rate, float32 or wider always.

    `module.to(bfloat16)` and `.half()` leave them so: bfloat16 would round the updates away.
    """

    def __init__(self, heads: int, dim: int, hidden: int, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": wide(dtype)}
        # Columns of norm sqrt(dim) meet unit keys: pre-activations of order 1, where GELU bends.
        self.w1 = nn.Parameter(torch.randn(heads, dim, hidden, **factory))
        self.w2 = nn.Parameter(torch.zeros(heads, hidden, dim, **factory))
        self.step_size = nn.Parameter(torch.full((heads,), -2.0, **factory))

    def _apply(self, fn, recurse=True):
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = wide(moved.dtype)
            return moved if kept == moved.dtype else tensor.to(device=moved.device, dtype=kept)

        return super()._apply(keep_wide, recurse)


class TTTMLP(LatentMemory):
    """M slot queries read a per-row MLP `unit(gelu(q W1)) W2`, per memory head.

    Args:
        dim: width of the hidden states.
        heads: memory heads h; `head_dim` d and `hidden` n are per memory head.
        slots: virtual tokens, M.
        chunk: tokens per memory version, C.
        attention: `(kv_heads, head_dim)` of the attention that reads the memory.
        device, dtype: of the slow weights; the fast weights are float32.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        hidden: int,
        slots: int,
        chunk: int,
        attention: tuple[int, int],
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(slots, heads * head_dim, *attention, device=device, dtype=dtype)
        self.heads, self.head_dim, self.chunk = heads, head_dim, chunk
        self.width = heads * (2 * head_dim + 1)
        self.cap = math.sqrt(hidden * head_dim)
        project = torch.randn(dim, self.width, device=device, dtype=dtype) / math.sqrt(dim)
        self.project = nn.Parameter(project)
        self.rate = nn.Parameter(torch.zeros(heads, device=device, dtype=dtype))
        self.slot_query = nn.Parameter(
            torch.randn(heads, slots, head_dim, device=device, dtype=dtype)
        )
        self.fast = FastWeights(heads, head_dim, hidden, device, dtype)

    def features(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return x.to(self.project.dtype) @ self.project

    def initial(self, batch_size: int) -> MemoryState:
        w1, w2 = self.fast.w1, self.fast.w2
        fast = {"w1": w1, "w2": w2, "grad": torch.zeros_like(w1)}
        return {name: w.expand(batch_size, *w.shape) for name, w in fast.items()}

    def feed(self, state: MemoryState, token: Tensor) -> MemoryState:
        return self.feed_chunk(state, token[:, None])

    def feed_chunk(
        self, state: MemoryState, tokens: Tensor, valid: Tensor | None = None
    ) -> MemoryState:
        if valid is not None:
            # A token of zeros has k = v = phi = 0: it changes nothing.
            tokens = tokens.masked_fill(~valid[..., None], 0)
        k, v, eta = self._split(tokens)
        w1, w2 = state["w1"], state["w2"]
        z = k @ w1  # [B, h, L, n]
        a = gelu(z)
        length = torch.rsqrt(a.square().sum(-1, keepdim=True) + EPS)
        phi = a * length
        error = self._errors(phi, v - phi @ w2, eta)  # against the running W2, [B, h, L, d]
        new_w2 = w2 + phi.transpose(-1, -2) @ (eta * error)
        # d/dphi of |v - phi W2|^2 / 2 at the running W2, then back through unit, GELU and k W1.
        d_phi = -(error @ w2.transpose(-1, -2))
        if tokens.shape[1] > 1:
            d_phi = d_phi - torch.tril(error @ error.transpose(-1, -2), -1) @ (eta * phi)
        d_a = (d_phi - phi * (phi * d_phi).sum(-1, keepdim=True)) * length
        grad = state["grad"] + k.transpose(-1, -2) @ (d_a * gelu_slope(z))
        return {"w1": w1, "w2": new_w2, "grad": grad}

    @staticmethod
    def _errors(phi: Tensor, residual: Tensor, eta: Tensor) -> Tensor:
        """Each token's prediction error after the tokens before it: the delta rule's solve."""
        if phi.shape[-2] == 1:
            return residual
        overlap = torch.tril(phi @ phi.transpose(-1, -2), -1) * eta.transpose(-1, -2)
        return torch.linalg.solve_triangular(overlap, residual, upper=False, unitriangular=True)

    def finish(self, state: MemoryState) -> MemoryState:
        grad = state["grad"] / self.chunk
        step = grad * torch.rsqrt(1 + grad.square().sum((-1, -2), keepdim=True))  # norm below 1
        rate = torch.sigmoid(self.fast.step_size)[:, None, None]
        w1 = state["w1"] - rate * step
        norm = torch.linalg.vector_norm(self.fast.w1, dim=-2, keepdim=True)
        w1 = w1 * (norm * torch.rsqrt(w1.square().sum(-2, keepdim=True) + EPS))
        w2 = state["w2"]
        size = w2.square().sum((-1, -2), keepdim=True)
        w2 = w2 * (self.cap * torch.rsqrt(size + EPS)).clamp(max=1)
        return {"w1": w1, "w2": w2, "grad": torch.zeros_like(grad)}

    def read(self, state: MemoryState, batch_size: int) -> Tensor:
        q = unit(self.slot_query.to(state["w1"].dtype))
        r = rms_norm(unit(gelu(q @ state["w1"])) @ state["w2"])  # [B, h, M, d]
        return r.transpose(1, 2).flatten(2)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, L, F]` -> unit keys and values `[B, h, L, d]`, rates `[B, h, L, 1]`."""
        both = self.heads * self.head_dim
        # A float16 projection may overflow to infinity, which the norms would turn into NaN.
        finite = tokens.to(self.fast.w1.dtype).clamp(-LARGEST, LARGEST)
        k, v, rate = finite.split([both, both, self.heads], dim=-1)
        k = unit(k.unflatten(-1, (self.heads, -1))).transpose(1, 2)
        v = rms_norm(v.unflatten(-1, (self.heads, -1))).transpose(1, 2)
        eta = torch.sigmoid(rate + self.rate.to(rate.dtype))
        return k, v, eta.transpose(1, 2).unsqueeze(-1)
