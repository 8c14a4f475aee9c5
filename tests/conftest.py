"""Settings of every test run, and the training run that several files of tests take up."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # Moshi reads it on import
# Also in the processes that tests start: a result must not depend on the number of threads, and
# two workers on two cores have no use for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

# A test result must not depend on the day: examples are derived from the test's name. For a search
# with fresh examples run `pytest --hypothesis-profile=search`.
slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", deadline=None, max_examples=30, derandomize=True, suppress_health_check=slow
)
settings.register_profile("search", deadline=None, max_examples=300, suppress_health_check=slow)
# For planted faults: finding one is enough, the smallest example is not needed.
settings.register_profile("mutants", settings.get_profile("ci"), phases=[Phase.generate])
settings.load_profile("ci")


@pytest.fixture
def tiny_mimi(monkeypatch) -> None:
    """Training runs load a narrow Mimi."""
    from training_support import use_tiny_mimi

    use_tiny_mimi(monkeypatch)


@pytest.fixture(scope="session")
def small_moshi(tmp_path_factory):
    """A small Moshi in Moshi's file formats: LM, LoRA, Mimi, tokenizer, and some speech."""
    from launch_files import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def models(small_moshi):
    """The small Moshi as a server loads it."""
    from serving_support import Models

    return Models.of(small_moshi)


@pytest.fixture(scope="module")
def heard(small_moshi):
    """What clients of a server say."""
    from serving_support import LENGTH, VOICES, voices

    return voices(small_moshi.speech, VOICES, LENGTH)


@pytest.fixture(scope="session")
def browser(small_moshi, tmp_path_factory):
    """A headless Chromium whose microphone hears speech."""
    from page_support import MISSING, chromium

    if MISSING:
        pytest.skip(f"no {' and no '.join(MISSING)}: Debian's packages chromium, chromium-driver")
    with chromium(tmp_path_factory.mktemp("browser"), small_moshi.speech) as page:
        yield page


@pytest.fixture
def page(browser):
    """The same, with nothing of another test on it or in its log."""
    browser.driver.get("about:blank")
    browser.errors()
    return browser


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a program into the working directory; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(code: str, name: str = "program.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
        return name

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint and recordings, a run's settings beside them."""
    from training_support import write_run

    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def done(folder) -> Path:
    """A run of three steps, with a checkpoint of each."""
    from run_support import trained

    return trained(folder, "done")


@pytest.fixture
def half(done, request) -> Path:
    """A copy of it that was killed after its second checkpoint."""
    from run_support import half_of

    return half_of(done, f"half {request.node.name}")
