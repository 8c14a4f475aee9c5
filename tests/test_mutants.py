"""The property tests find planted faults.

Each mutant is one edit in a copy of the package; the property tests, run on that copy, must fail.
The unedited copy must pass, so that a failure means the fault was seen and not a broken copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PROPERTIES = ("test_semantics.py", "test_machine.py")

# name: (file, what stands there, what the mutant says instead)
MUTANTS = {
    "eviction one token early": (
        "recent.py", "(tokens - self.recent).clamp", "(tokens - self.recent + 1).clamp",
    ),
    "eviction not in chunks": (
        "recent.py", "return self.version(tokens) * self.chunk", "return self.fed(tokens)",
    ),
    "ring written under a false mask": (
        "recent.py", "torch.where(mask[:, None, None], value.to(ring.dtype), kept)",
        "value.to(ring.dtype)",
    ),
    "memory updated under a false mask": (
        "step.py", "feeding = mask & (fed > 0)", "feeding = fed > 0",
    ),
    "count advanced under a false mask": (
        "step.py", "torch.where(mask, token, state.count)", "token",
    ),
    "stale virtual tokens": (
        "step.py", "per_row(feeding & boundary, readout)",
        "per_row(feeding & (fed == window.chunk), readout)",
    ),
    "virtual tokens before anything is evicted": (
        "step.py", "written = (gone > 0)", "written = (gone >= 0)",
    ),
    "memory not reset": (
        "state.py", "for _, tensor in self.tensors():\n            tensor.masked_fill_",
        "for name, tensor in self.tensors():\n            '.' in name or tensor.masked_fill_",
    ),
    "rows committed without their mask": (
        "state.py", "torch.where(per_row(mask, mine), theirs.to(mine.dtype), mine)", "theirs",
    ),
    "virtual scores with the query after RoPE": (
        "step.py", "cache.memory.score(q.unsqueeze(3)", "cache.memory.score(turned_q.unsqueeze(3)",
    ),
    "sinks at their old position": (
        "step.py", "token - window.capacity - window.sinks", "token - 1",
    ),
    "joint bias on the wrong side": (
        "attention.py", "virtual + self._per_head", "virtual - self._per_head",
    ),
    "window one token short": ("parallel.py", "(columns > gone", "(columns > 1 + gone"),
    "a version published one chunk late": (
        "scan.py", "complete = complete <= after", "complete = complete < after",
    ),
    "chunk form without the rates": (
        "memory/ttt_mlp.py", "-1) * eta.transpose(-1, -2)", "-1)",
    ),
    "first layer's gradient at the old second layer": (
        "memory/ttt_mlp.py", "if tokens.shape[1] > 1:", "if False:",
    ),
    "second layer without its cap": (
        "memory/ttt_mlp.py", "(self.cap * torch.rsqrt(size + EPS)).clamp(max=1)", "1.0",
    ),
    "read-outs shared between rows": (
        "memory/ttt_mlp.py", "return r.transpose(1, 2).flatten(2)",
        "return r.transpose(1, 2).flatten(2).roll(1, 0)",
    ),
    "fast weights follow the model's dtype": (
        "memory/ttt_mlp.py", "return super()._apply(keep_wide, recurse)",
        "return super()._apply(fn, recurse)",
    ),
    "mean over one token too many": (
        "memory/mean.py", 'seen = state["seen"] + 1', "seen = 2 + state['seen']",
    ),
    "blocks that see too short a history": (
        "span.py", "else window.capacity", "else window.recent - 1",
    ),
    "second block without the tokens of the first": (
        "span.py", "count is None and blocks == 1", "count is None",
    ),
}  # fmt: skip


def copy_of_the_package(folder: Path) -> Path:
    for name in ("ttt_cache", "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.wav", ".hypothesis")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    (folder / "pytest.ini").touch()
    return folder / "ttt_cache"


def run_properties(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    tests = [f"tests/{name}" for name in PROPERTIES]
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "--tb=no"]
    return subprocess.run(
        [*command, "--hypothesis-profile=mutants", *tests],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_the_copy_itself_passes(tmp_path):
    copied = copy_of_the_package(tmp_path)
    where = "import ttt_cache; print(ttt_cache.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], cwd=tmp_path, text=True)
    assert Path(found.strip()).parent == copied
    result = run_properties(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("fault", MUTANTS)
def test_planted_faults_are_found(fault, tmp_path):
    file, stands, mutant = MUTANTS[fault]
    path = copy_of_the_package(tmp_path) / file
    source = path.read_text()
    assert source.count(stands) == 1, f"{file} has {source.count(stands)} times: {stands}"
    path.write_text(source.replace(stands, mutant))
    result = run_properties(tmp_path)
    assert result.returncode == 1, f"not found: {fault}\n{result.stdout}{result.stderr}"
    assert "1 failed" in result.stdout, result.stdout
