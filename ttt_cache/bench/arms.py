"""What is compared, and what cannot be here, with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .core import Core, Place
from .device import triton_missing
from .peers import Attend, flashinfer_missing, flashinfer_window, flex, install, two_sdpa
from .plan import Plan

ELSEWHERE = "it is measured on a GPU only"


@dataclass(frozen=True)
class Arm:
    """One way to compute the core.

    Attributes:
        about: what it is, for a person.
        context: frames in the ring of stock Moshi; of a patched arm, what it stands in for.
        settings: of `ttt_cache.patch`; `None` for stock Moshi.
        backend: which code answers the steps of a patched arm.
        peer: whose attention it uses instead.
        partial: whether it can answer while its window is not full.
    """

    name: str
    about: str
    context: int
    settings: Mapping[str, Any] | None = None
    backend: str = "reference"
    peer: Callable[[Core], Attend] | None = field(default=None, compare=False)
    partial: bool = True

    @property
    def stock(self) -> bool:
        return self.settings is None

    def build(self, place: Place) -> Core:
        """Raises whatever its library raises where it cannot be had after all."""
        core = Core(place, self.context, self.settings, self.backend)
        if self.peer is not None:
            install(core, self.name, self.peer)
        return core

    def twin(self, place: Place) -> Core | None:
        """A core that must give the same outputs at any time; `None` for the reference itself."""
        if self.stock or (self.backend == "reference" and self.peer is None):
            return None
        return Core(place, self.context, self.settings)


def arms_of(plan: Plan) -> tuple[list[Arm], dict[str, str]]:
    """The arms that a plan can have, stock ones first, and why the others are not there."""
    n, longest = plan.recent, plan.contexts[-1]
    patched = {"recent": n, "virtual": plan.virtual, "chunk": plan.chunk}
    window, gated = {"recent": n, "memory": "none"}, patched | {"gate": "head"}
    missing = triton_missing(plan.device)
    own = "reference" if missing else "triton"
    slow = None if plan.device.type == "cuda" else ELSEWHERE
    said = f"{n} frames and {plan.virtual} virtual tokens"
    arms = [Arm(f"stock {c}", f"Moshi's own, a ring of {c} frames", c) for c in plan.contexts]
    arms.append(Arm("patched", f"{said}, plain PyTorch", longest, patched))
    absent: dict[str, str] = {}

    def add(arm: Arm, against: str | None) -> None:
        if against is None:
            arms.append(arm)
        else:
            absent[arm.name] = against

    kernels = f"{said}, Triton kernels"
    add(Arm("patched, triton", kernels, longest, patched, "triton"), missing)
    add(Arm("window", f"{n} frames and no memory ({own})", longest, window, own), None)
    add(Arm("two SDPA", f"{said}: two SDPA calls, a gate", longest, gated, peer=two_sdpa), None)
    about = f"{said}: two calls of FlexAttention, a gate"
    add(Arm("FlexAttention", about, longest, gated, peer=flex), slow)
    about, peer = f"{n} frames and no memory, FlashInfer", flashinfer_window
    name = "FlashInfer window"
    against = slow or flashinfer_missing()
    add(Arm(name, about, longest, window, peer=peer, partial=False), against)
    return arms, absent
