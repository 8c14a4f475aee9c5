"""Triton kernels without a GPU: run in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ttt_cache.kernels.launch import Launch

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that one program may ask for
HERE = Path(__file__).parent
WIDE = re.compile(r"\b(?:LDG\.E\S*|LDGSTS\.E\S*)\.128\b")


class Compiled(NamedTuple):
    """What became of a kernel; `spills` and `shared` in bytes, `wide_loads` are 128-bit loads."""

    name: str
    capability: int
    registers: int
    spills: int
    shared: int
    wide_loads: int

    def __str__(self) -> str:
        return (
            f"{self.name} sm_{self.capability}: {self.registers} registers, {self.spills} B "
            f"spilled, {self.shared:,} B shared, {self.wide_loads} loads of 128 bits"
        )


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile a launch for a GPU that is not there; its tensors may be on the `meta` device.

    Goes through the JIT's own specialisation of the arguments (divisible by 16, equal to 1), so it
    is the code that the launch would run.
    """
    # Not `driver.set_active`: there is no way back from it where there is no GPU.
    with patch.object(driver, "_active", _Absent(capability)):
        made = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    registers, spills = _assembled(made.asm["ptx"], capability)
    wide = len(WIDE.findall(_disassembled(made.asm["cubin"])))
    return Compiled(made.name, capability, registers, spills, made.metadata.shared, wide)


def assert_fits(launch: Launch, capability: int) -> Compiled:
    """Compile, print the figures, and check spills, shared memory and 128-bit loads."""
    found = compiled(launch, capability)
    print(found)
    assert found.spills == 0, found
    assert found.shared <= SHARED_LIMIT[capability], found
    assert found.wide_loads > 0, found
    return found


def run_interpreted(cases: str, *options: str) -> None:
    """Run a file of tests in Triton's interpreter.

    In a process of its own: `triton.jit` looks at TRITON_INTERPRET when a kernel is defined, and
    an interpreted kernel cannot be compiled.

    Args:
        cases: file beside this one, not named `test_*`, so that nothing else collects it.
        options: for pytest.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, cases]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=900
    )
    print(found.stdout)
    assert found.returncode == 0, f"{cases} failed in Triton's interpreter:\n{found.stdout}"


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NaN everywhere: what a kernel forgets to write is seen."""
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_accurate(
    actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, share: float = 2.0
) -> float:
    """Compare with a float64 reference; the budget is what plain arithmetic loses.

    Args:
        actual: of the kernel.
        exact: of the reference in float64.
        plain: of the reference in the dtype of the kernel.
        share: how many times the loss of `plain` is allowed.

    Returns:
        the largest error as a share of the budget.
    """
    assert torch.isfinite(actual).all(), "a kernel left an output unwritten or made it NaN"
    eps = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    budget = share * ((plain.double() - exact).abs().max().item() + eps)
    error = (actual.double() - exact).abs().max().item()
    assert error <= budget, f"error {error:.2e} beyond the budget of {budget:.2e}"
    return error / budget if budget else 0.0


class _Absent:
    """A driver of a GPU that is not there: enough of one to compile for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # the JIT keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes, by the assembler's own account."""
    # Triton's own, as `ptx` is: 9.0a, 10.0a.
    name = re.search(r"\.target (sm_\w+)", ptx)
    assert name is not None, f"no target in the code for sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name[1]}", file.name]
        said = _said([*command, "-o", "/dev/null"])
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None and spills is not None, said
    return int(registers[1]), int(spills[1]) + int(spills[2])


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _said([knobs.nvidia.cuobjdump.path, "-sass", file.name])


def _said(command: list[str]) -> str:
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return found.stdout + found.stderr
