"""What the tests of the benchmark share: one small layer, and a plan for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ttt_cache.bench.core import Place, Widths
from ttt_cache.bench.plan import Plan, make_plan

WIDTHS = Widths(64, 2)
CPU = torch.device("cpu")
PLACE = Place(2, CPU, torch.float32, widths=WIDTHS)
PATCHED = {"recent": 6, "virtual": 3, "chunk": 8}


def small(**changes) -> Plan:
    plan = make_plan([1, 2], (40, 90), recent=6, virtual=3, device="cpu", repetitions=3)
    return replace(plan, widths=WIDTHS, **changes)
