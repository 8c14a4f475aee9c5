"""What the training attention's kernels are started with."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .inputs import Gate
from .launch import Launch
from .sizes import pieces
from .window_columns import window_columns, window_latents
from .window_forward import window_forward
from .window_inputs import Latents, Seen
from .window_queries import window_queries
from .window_sizes import Sizes

SPAN = 512  # queries that a program goes through for the gradient of a tile of sinks
PROGRAMS = 256  # below that heads are dealt to several programs for the gradients of latents
OPTIONS = {"num_warps": 8, "num_stages": 2}

View = tuple[Tensor | None, int, int, int]


class Call(NamedTuple):
    """One call as the kernels see it.

    Attributes:
        seen: of the call.
        latents: of the call, all in the dtype of q but for the gate; `None` without a memory.
        absorbed: `[B, H, T, WIDTH]`: `W_K^T q`, and from column `lead` on `q . key_m`, scaled.
        lse: of window with sinks, and of virtual tokens, float32 `[2, B, H, T]`.
        sizes: what kernels are compiled for.
    """

    seen: Seen
    latents: Latents | None
    absorbed: Tensor | None
    lse: Tensor
    sizes: Sizes

    def always(self) -> dict[str, Any]:
        """Arguments of every kernel."""
        tokens = self.seen.q.shape[2]
        return {
            "start_ptr": self.seen.start,
            "lse_ptr": self.lse,
            "tokens": tokens,
            "s": self.sizes,
        }

    def exact(self) -> dict[str, Any]:
        """Arguments of kernels that go through window and sinks."""
        views = {name: view(x) for name, x in self.seen._asdict().items() if name != "start"}
        history = self.seen.keys.shape[2] - self.seen.q.shape[2]
        return {**views, "history": history, "scale": scale(self.sizes)}

    def virtual(self) -> dict[str, Any]:
        """Arguments of kernels that go through virtual tokens."""
        readouts = None if self.latents is None else self.latents.readouts
        return {
            "absorbed": view(self.absorbed),
            "readouts": view(None if readouts is None else readouts.flatten(1, 2)[:, None]),
            "slot_bias_ptr": None if self.latents is None else self.latents.slot_bias,
            "versions": 0 if readouts is None else readouts.shape[1],
        }

    def gate(self) -> dict[str, Any]:
        """Arguments of kernels that weigh window and memory."""
        gate = Gate("none") if self.latents is None else self.latents.gate
        return {"bias_ptr": gate.bias, "weight_ptr": gate.weight, "alpha": float(gate.alpha)}

    def by_queries(self) -> tuple[int, int, int]:
        """A program for each tile of queries of each head."""
        batch, heads, tokens, _ = self.seen.q.shape
        return pieces(tokens, self.sizes.block_q), heads, batch


class Back(NamedTuple):
    """What the gradients are made of beside the call itself.

    Attributes:
        recent: what window and sinks gave of the output, `[B, H, T, D]`.
        dy: the output's gradient, likewise.
        dlatent: the gradient of the mix of latents, `[B, H, T, E]`.
        kept: of each query, made by `queries_launch` for the others: the share of the window and
            what is taken from its scores' gradients, then the same of the memory; float32
            `[4, B, H, T]`.
    """

    recent: Tensor
    dy: Tensor
    dlatent: Tensor | None
    kept: Tensor


def scale(sizes: Sizes) -> float:
    """What scores are multiplied by."""
    return sizes.d**-0.5


def view(x: Tensor | None) -> View:
    """A tensor `[B, H, T, *]` and the strides of its first axes."""
    return (None, 0, 0, 0) if x is None else (x, x.stride(0), x.stride(1), x.stride(2))


def forward_launch(call: Call, recent: Tensor, latent: Tensor | None) -> Launch:
    """What window and sinks bring, and the mix of the latents, both weighed; and `call.lse`."""
    arguments = {
        **call.exact(),
        **call.virtual(),
        **call.gate(),
        **call.always(),
        "recent": view(recent),
        "latent": view(latent),
    }
    return Launch(window_forward, call.by_queries(), arguments, OPTIONS)


def queries_launch(
    call: Call,
    back: Back,
    dq: Tensor,
    dturned: Tensor,
    dabsorbed: Tensor | None,
    latent: Tensor | None,
    dlogit: Tensor | None,
) -> Launch:
    """Gradients by queries (before RoPE: those of sinks and gate), the mix again, `back.kept`."""
    arguments = {
        **call.exact(),
        **call.virtual(),
        **call.gate(),
        **call.always(),
        **{name: view(getattr(back, name)) for name in ("recent", "dy", "dlatent")},
        "kept_ptr": back.kept,
        "dq": view(dq),
        "dturned": view(dturned),
        "dabsorbed": view(dabsorbed),
        "latent": view(latent),
        "dlogit_ptr": dlogit,
    }
    return Launch(window_queries, call.by_queries(), arguments, OPTIONS)


def columns_launch(call: Call, back: Back, dkeys: Tensor, dvalues: Tensor, sinks: bool) -> Launch:
    """Gradients by columns or by sinks, `[PARTS, B, Hkv, L|S, D]`."""
    exact, sizes = call.exact(), call.sizes
    of = ("q", "sink_keys", "sink_values") if sinks else ("turned_q", "keys", "values")
    parts, batch, kv_heads, columns, _ = dkeys.shape
    arguments = {
        **dict(zip(("q", "keys", "values"), (exact[name] for name in of), strict=True)),
        **call.always(),
        "dy": view(back.dy),
        "kept_ptr": back.kept,
        "dkeys": view(dkeys[0]),
        "dvalues": view(dvalues[0]),
        "dkeys_part": dkeys.stride(0),
        "dvalues_part": dvalues.stride(0),
        **{name: exact[name] for name in ("history", "scale")},
        "columns": columns,
        "span": SPAN,
        "sinks": sinks,
    }
    blocks = pieces(columns, sizes.block_s if sinks else sizes.block_c)
    return Launch(window_columns, (blocks * parts, kv_heads, batch), arguments, OPTIONS)


def latents_launch(call: Call, back: Back, dreadouts: Tensor) -> Launch:
    """Gradients by latents, float32 `[PARTS, B, V M, E]`."""
    parts, batch, columns, _ = dreadouts.shape
    arguments = {
        **call.virtual(),
        **call.always(),
        "dlatent": view(back.dlatent),
        "kept_ptr": back.kept,
        "dreadouts": view(dreadouts[0][:, None]),
        "dreadouts_part": dreadouts.stride(0),
        "span": pieces(call.sizes.heads, parts),
    }
    grid = (pieces(columns, call.sizes.block_u), parts, batch)
    return Launch(window_latents, grid, arguments, OPTIONS)


def sink_parts(call: Call) -> int:
    """How many programs share the queries of a tile of sinks."""
    return pieces(call.seen.q.shape[2], SPAN)


def head_parts(call: Call) -> int:
    """How many programs share the heads that read a tile of latents: enough to fill a GPU."""
    assert call.latents is not None
    batch, versions, slots, _ = call.latents.readouts.shape
    tiles = batch * pieces(versions * slots, call.sizes.block_u)
    heads = call.sizes.heads
    return pieces(heads, pieces(heads, pieces(PROGRAMS, tiles)))
