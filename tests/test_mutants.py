"""The property tests find planted faults, the tests of derivatives those on the way back, and
single tests those of what is measured.

Each mutant is one edit in a copy of the package; the tests, run on that copy, must fail.
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
# What presets have is in any settings.
PROPERTIES = ("any or machine or gate or narrow", "test_semantics.py", "test_machine.py")
DERIVATIVES = ("derivatives", "test_gradients.py")

# name: (file, what stands there, what the mutant says instead)
MUTANTS = {
    "eviction one token early": (
        "recent.py", "(tokens - self.wait).clamp", "(tokens - self.wait + 1).clamp",
    ),
    "eviction not in chunks": (
        "recent.py", "return self.version(tokens) * self.chunk", "return self.fed(tokens)",
    ),
    "ring written under a false mask": (
        "recent.py", "torch.where(mask[:, None, None], value, self.read(ring))", "value",
    ),
    "memory updated under a false mask": (
        "step.py", "feeding = mask & (fed > 0)", "feeding = fed > 0",
    ),
    "count advanced under a false mask": (
        "step.py", "state.count.add_(mask)", "state.count.add_(1)",
    ),
    "stale virtual tokens": (
        "step.py", 'state["readout"].copy_(memory.read(',
        'state["readout"].any() or state["readout"].copy_(memory.read(',
    ),
    "virtual tokens that lie ready too long": (
        "ready.py", 'if not torch.equal(made["readout"], readout):',
        'if made["readout"].isnan().any():',
    ),
    "memories that do not start at version 0": (
        "step.py", "change(feeding & (fed == 1)", "change(feeding & (fed == 0)",
    ),
    "rows between those of a mask changed with them": (
        "rows.py", "if rows[-1] - rows[0] == len(rows) - 1:", "if True:",
    ),
    "virtual tokens before anything is evicted": (
        "cache.py", "return tokens >= self.window.wait + self.window.chunk",
        "return tokens >= 0",
    ),
    "memory not reset": (
        "state.py", "for _, tensor in self.tensors():\n            tensor.index_fill_",
        "for name, tensor in self.tensors():\n            '.' in name or tensor.index_fill_",
    ),
    "rows committed without their mask": (
        "state.py", "torch.where(per_row(mask, mine), theirs.to(mine.dtype), mine)", "theirs",
    ),
    "virtual scores with the query after RoPE": (
        "step.py", "return _attend(cache, reader, q, scores",
        "return _attend(cache, reader, cache.rotate(q, q, token - 1)[0], scores",
    ),
    "sinks at their old position": (
        "step.py", "token - window.capacity - window.sinks", "token - 1",
    ),
    "joint bias on the wrong side": (
        "attention.py", "virtual + self._per_head", "virtual - self._per_head",
    ),
    "window one token short": ("span.py", "(columns <= gone)", "(columns <= 1 + gone)"),
    "a version published one chunk late": (
        "grid.py", "chunk - 1 :: chunk] <= after", "chunk - 1 :: chunk] < after",
    ),
    "chunk form without the rates": (
        "memory/delta.py", "-1) * eta.transpose(-1, -2)", "-1)",
    ),
    "gradients at the old last layer": (
        "memory/delta.py", "if phi.shape[-2] > 1:", "if False:",
    ),
    "last layer without its cap": (
        "memory/delta.py", "(rule.cap * inverse_norm(last, (-1, -2))).clamp(max=1)",
        "torch.ones_like(last)",
    ),
    "read-outs shared between rows": (
        "memory/ttt.py", "return rms_norm(answers, READ_EPS).transpose(-3, -2).flatten(-2)",
        "return rms_norm(answers, READ_EPS).transpose(-3, -2).flatten(-2).roll(1, 0)",
    ),
    "fast weights follow the model's dtype": (
        "memory/network.py", "return super()._apply(keep_wide, recurse)",
        "return super()._apply(fn, recurse)",
    ),
    "means over one token too many": ("memory/cluster.py", "/ (members + 1)", "/ (members + 2)"),
    "clusters without the weight of their counts": (
        "memory/tokens.py", "scores + members.log().transpose(-1, -2).to(q.dtype)",
        "scores + members.clamp(max=1).log().transpose(-1, -2).to(q.dtype)",
    ),
    "one cluster takes every token": (
        "memory/cluster.py", "distance.amin(-2", "distance.amax(-2",
    ),
    "a repeated key starts a cluster": (
        "memory/cluster.py", "torch.where(members > 0, distance, 0)",
        "torch.where(members > 0, distance, -1)",
    ),
    "a mean that stands for many": (
        "memory/cluster.py", 'torch.ones_like(state["members"])', 'state["members"]',
    ),
    "values as keys under source=kv": (
        "memory/base.py", "torch.cat([by_token(self.k), by_token(self.v)], dim=-1)",
        "torch.cat([by_token(self.v), by_token(self.k)], dim=-1)",
    ),
    "keys as queries under source=kv": (
        "memory/base.py", "return by_token(self.q) if", "return by_token(self.q).flip(-1) if",
    ),
    "memory late by a token under write=arrived": (
        "recent.py", "return 0 if self.arrived else self.recent",
        "return min(1, self.recent) if self.arrived else self.recent",
    ),
    "windows that lose tokens a chunk at a time under write=arrived": (
        "recent.py", "if self.arrived:\n            return (tokens - self.recent)",
        "if False:\n            return (tokens - self.recent)",
    ),
    "queries that see their unfinished chunk under write=evicted": (
        "step.py", "state.memory if cache.window.arrived else", "state.memory if True else",
    ),
    "queries blind to the unfinished chunk under write=arrived": (
        "scan.py", "if window.arrived:", "if False:",
    ),
    "queries blind to their own token": (
        "memory/ttt.py", "torch.tril(phi @ learned.transpose(-1, -2))",
        "torch.tril(phi @ learned.transpose(-1, -2), -1)",
    ),
    "a chunk's last query before its chunk closes": (
        "scan.py", "torch.where(part.closes.t()[..., None, None], last, running[:, :, -1:])",
        "running[:, :, -1:]",
    ),
    "answers of another token": (
        "scan.py", "first = span.start[:, None] - window.wait - grid.token[:, :1] + 1",
        "first = span.start[:, None] - window.wait - grid.token[:, :1]",
    ),
    "queries that are not of unit length": (
        "memory/query.py", "return unit(memory.split_heads(", "return (memory.split_heads(",
    ),
    "gradients that skip the second hidden layer": (
        "memory/network.py", "d_phi = d_z @ weight.transpose(-1, -2)", "d_phi = d_phi[..., :]",
    ),
    "hidden layers that share one rate": (
        "memory/ttt.py", "self.fast.step_size.unbind()",
        "self.fast.step_size[:1].expand(len(self.fast.hidden), -1).unbind()",
    ),
    "decay that favours the oldest": (
        "memory/tokens.py", "torch.arange(self.slots - 1, -1, -1, device",
        "torch.arange(self.slots, device",
    ),
    "slot biases of the wrong heads": (
        "memory/tokens.py", "return self.slot_bias", "return self.slot_bias.flip(0)",
    ),
    "a reset memory that is read": ("cache.py", "if self.config.reset_memory:", "if False:"),
    "a window's output beside a written memory only": (
        "attention.py", "torch.where(written, self._alpha(q), one)", "self._alpha(q) * one",
    ),
    "blocks that see too short a history": (
        "span.py", "self.history + start + 1 - capacity", "self.history + start + 2 - capacity",
    ),
    "second block without the tokens of the first": (
        "span.py", "max(0, self.history + start + 1 - capacity)", "self.history + start",
    ),
    "queries that read the version before their own": (
        "reading.py", "torch.stack([first, first + 1]", "torch.stack([first, first]",
    ),
    "a call's newest version read too early": (
        "scan.py", "closed = grid.complete.sum(1)", "closed = 0 * grid.complete.sum(1)",
    ),
}  # fmt: skip


BACKWARD_MUTANTS = {
    "an error's gradient with the wrong sign": (
        "memory/adjoint.py", "of_last.baddbmm_(phi.transpose(-1, -2), by_residual, alpha=-1)",
        "of_last.baddbmm_(phi.transpose(-1, -2), by_residual)",
    ),
    "a solve differentiated by one of its two factors": (
        "memory/adjoint.py",
        "by_phi.baddbmm_(mixed + mixed.transpose(-1, -2), phi, alpha=-1)",
        "by_phi.baddbmm_(mixed, phi, alpha=-1)",
    ),
    "gradients without the bend of a step's length": (
        "memory/adjoint.py", "torch.mul(total, bend * dots[-1], out=by_total)",
        "torch.mul(total, 0, out=by_total)",
    ),
    "gradients without the pull of a binding cap": (
        "memory/adjoint.py", "of_last.mul_(shrink).addcmul_(full, pull * dot, value=-1)",
        "of_last.mul_(shrink)",
    ),
    "rates that ignore how tokens couple": (
        "memory/adjoint.py", "by_eta - coupled.tril(-1).sum(-2)[..., None]", "by_eta",
    ),
    "chunks made again from the version after them": (
        "memory/chunks.py", "torch.cat([start[None], after[:-1]])", "after.clone()",
    ),
    "a begun chunk made again without its total": (
        "memory/again.py", "total[0] += totals[n]", "total[0] += 0 * totals[n]",
    ),
    "last products whose second factor learns nothing": (
        "product.py", "a.transpose(-1, -2) @ gradient", "0 * (a.transpose(-1, -2) @ gradient)",
    ),
}  # fmt: skip
# name: (file, what stands there, what the mutant says instead, the test that finds it, its file)
MEASURING_MUTANTS = {
    "facts just beyond every window that are not far": (
        "evaluation/recall.py", "age >= self.recent + self.chunk", "age > self.recent + self.chunk",
        "everything_by_hand", "test_evaluation_recall.py",
    ),
    "arms that are not drawn in pairs": (
        "evaluation/crossentropy.py",
        "mine, theirs = (_mean(a.tallies[measure], bins, weights) for a in (arm, other))",
        "mine, theirs = (_mean(a.tallies[measure], bins, w) for a, w in "
        "((arm, weights), (other, weights.flip(0))))",
        "excess_is_paired", "test_evaluation_crossentropy.py",
    ),
    "jumps with the wrong sign": (
        "evaluation/crossentropy.py",
        "_excess(arm, full, measure, after, w) - _excess(arm, full, measure, before, w)",
        "_excess(arm, full, measure, before, w) - _excess(arm, full, measure, after, w)",
        "a_jump_is_what", "test_evaluation_crossentropy.py",
    ),
    "predictions that have seen the answer": (
        "training/loss.py", "lm.forward_text(codes[:, :, :-1])", "lm.forward_text(codes[:, :, 1:])",
        "codebooks_are_averaged", "test_evaluation_forced.py",
    ),
    "a user who is heard before Moshi answers": (
        "evaluation/generation.py", "ahead[:, :, :-1])", "ahead[:, :, 1:])",
        "frames_are_those_of_training", "test_evaluation_freerun.py",
    ),
    "lessons that are measured on": (
        "evaluation/source.py",
        "draw(rows, frames, self.levels, rng).codes for _ in range(steps)",
        "next(self.pieces(rows, frames, seed)).codes for _ in range(steps)",
        "no_pieces", "test_evaluation_source.py",
    ),
    "answers with the value before the last": (
        "testbed/stream.py", "yield self._heard(v.FIRST_VALUE + known.value)",
        "yield self._heard(v.FIRST_VALUE + (known.value + known.rewritten) % v.VALUES)",
        "answers_and_marks", "test_testbed.py",
    ),
    "questions about what Moshi has said itself": (
        "demo/story.py", "            if told:\n", "            if True:\n",
        "said_itself", "test_demo.py",
    ),
}  # fmt: skip
EVERY = [(PROPERTIES, fault, MUTANTS[fault]) for fault in MUTANTS]
EVERY += [(DERIVATIVES, fault, BACKWARD_MUTANTS[fault]) for fault in BACKWARD_MUTANTS]
EVERY += [(found[3:], fault, found[:3]) for fault, found in MEASURING_MUTANTS.items()]
FINDERS = sorted({found[3:] for found in MEASURING_MUTANTS.values()})
MEASUREMENTS = " or ".join(name for name, _ in FINDERS), *sorted({file for _, file in FINDERS})


def copy_of_the_package(folder: Path) -> Path:
    for name in ("ttt_cache", "kernels", "tests", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "*.wav", ".hypothesis")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    (folder / "pytest.ini").touch()
    return folder / "ttt_cache"


def run_tests(folder: Path, chosen: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    names, *files = chosen
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "--tb=no"]
    command += ["-k", names, "--hypothesis-profile=mutants", *(f"tests/{name}" for name in files)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_copy_itself_passes(tmp_path):
    copied = copy_of_the_package(tmp_path)
    where = "import ttt_cache; print(ttt_cache.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], cwd=tmp_path, text=True)
    assert Path(found.strip()).parent == copied
    for chosen in (PROPERTIES, DERIVATIVES, MEASUREMENTS):
        result = run_tests(tmp_path, chosen)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("chosen, fault, edit", EVERY, ids=[fault for _, fault, _ in EVERY])
def test_planted_faults_are_found(chosen, fault, edit, tmp_path):
    file, stands, mutant = edit
    path = copy_of_the_package(tmp_path) / file
    source = path.read_text()
    assert source.count(stands) == 1, f"{file} has {source.count(stands)} times: {stands}"
    path.write_text(source.replace(stands, mutant))
    result = run_tests(tmp_path, chosen)
    assert result.returncode == 1, f"not found: {fault}\n{result.stdout}{result.stderr}"
    assert "1 failed" in result.stdout, result.stdout
