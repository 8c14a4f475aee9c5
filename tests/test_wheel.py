"""What a user installs: the wheel, in an environment of its own, used from another directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ttt_cache.serving.page import FOLDER

REPOSITORY = Path(__file__).parent.parent

USE = """
import sys
import torch
import ttt_cache, ttt_cache.kernels
from moshi.models.lm import LMModel

where = ttt_cache.__file__
assert where.startswith(sys.prefix), where
assert ttt_cache.kernels.__file__.startswith(sys.prefix)
model = LMModel(n_q=1, dep_q=0, delays=[0, 0], card=8, text_card=8, dim=16, num_heads=2,
                num_layers=2, context=50, positional_embedding="rope").eval()
with ttt_cache.patch(model, recent=8, virtual=2, chunk=4), torch.no_grad():
    ttt_cache.save_adapter(model, "adapter")
    with model.streaming(1):
        for step in range(30):
            out, _ = model.forward_text(torch.zeros(1, 2, 1, dtype=torch.long))
assert out.isfinite().all()
ttt_cache.load_adapter(model, "adapter")

from ttt_cache import testbed
from ttt_cache.demo.arms import ADAPTER

assert str(testbed.FOLDER).startswith(sys.prefix)
model = testbed.load()
ttt_cache.load_adapter(model, testbed.adapter(ADAPTER))
with model.streaming(1), torch.no_grad():
    out, _ = model.forward_text(torch.zeros(1, 5, 1, dtype=torch.long))
assert out.isfinite().all() and testbed.tokenizer().decode([4]) == "amber"
print("used", ttt_cache.__version__)
"""


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy: builds of two test workers in one tree would meet in its `build` folder.
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("ttt_cache", "kernels"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=folder)
    (built,) = folder.glob("dist/*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"ttt_cache/{p.relative_to(REPOSITORY / 'ttt_cache')}"
               for p in (REPOSITORY / "ttt_cache").rglob("*.py")}  # fmt: skip
    kernels = {f"ttt_cache/kernels/{p.name}" for p in (REPOSITORY / "kernels").glob("*.py")}
    data = REPOSITORY / "ttt_cache" / "data"
    shipped = {f"ttt_cache/data/{p.relative_to(data)}" for p in data.rglob("*") if p.is_file()}
    assert any(name.endswith("testbed/model.safetensors") for name in shipped)
    page = {f"ttt_cache/serving/page/{p.name}" for p in FOLDER.iterdir()}
    assert "ttt_cache/serving/page/index.html" in page
    assert not (sources | kernels | shipped | page | {"ttt_cache/py.typed"}) - names
    strangers = {n for n in names if not n.startswith(("ttt_cache/", "ttt_cache-"))}
    assert not strangers


def test_the_installed_wheel_works_elsewhere(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, cwd=tmp_path).strip())
    # The same packages, but as a plain path: the editable install's import hook stays behind.
    (site / "same_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=tmp_path
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(python, "-c", USE, cwd=elsewhere).startswith("used")
    assert "demo" in run(environment / "bin" / "ttt-cache", "--help", cwd=elsewhere)
