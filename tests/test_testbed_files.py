"""The testbed's files: Moshi's own formats, read by Moshi's own loader."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny_lm
from moshi.models.lm import LMModel
from safetensors import safe_open

import ttt_cache
from ttt_cache import testbed
from ttt_cache.config import CacheConfig
from ttt_cache.evaluation.adapters import HISTORY
from ttt_cache.evaluation.arms import controls, described
from ttt_cache.evaluation.hashes import adapter_hash, base_hash
from ttt_cache.evaluation.model import LESSONS
from ttt_cache.evaluation.recipe import DEFAULT, Course, Recipe
from ttt_cache.evaluation.source import TestbedSource
from ttt_cache.evaluation.subject import TESTBED_SETTINGS
from ttt_cache.report import report
from ttt_cache.testbed import files
from ttt_cache.testbed import vocabulary as v
from ttt_cache.testbed.model import CONFIG, CONTEXT
from ttt_cache.testbed.stream import LEVELS, NONE, draw
from ttt_cache.testbed.text import tokenizer_model

LARGEST = 25_000_000  # bytes of all files


@pytest.fixture(scope="module")
def lm() -> LMModel:
    return testbed.load()


def test_the_shipped_model_is_the_testbeds(lm: LMModel) -> None:
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.float32}
    assert not lm.training and lm.context == CONTEXT
    described = json.loads((testbed.FOLDER / files.CONFIG_NAME).read_text())
    assert {name: described[name] for name in CONFIG} == json.loads(json.dumps(CONFIG))
    with safe_open(testbed.FOLDER / files.WEIGHTS_NAME, "pt") as weights:
        made = {name: json.loads(text) for name, text in weights.metadata().items()}
    assert described["model_id"] == {"name": "ttt_cache testbed", **made}
    assert isinstance(made["seed"], int)
    assert sum(path.stat().st_size for path in testbed.FOLDER.rglob("*")) < LARGEST


@torch.no_grad()
def test_the_shipped_model_has_learned_to_answer(lm: LMModel) -> None:
    batch = draw(2, CONTEXT, [LEVELS["rewritten"]], random.Random("test"))
    chosen = lm(batch.codes).text_logits[:, 0].argmax(-1)
    asked = batch.answer != NONE
    assert (chosen == batch.answer)[asked].float().mean() > 0.95
    far = asked & (batch.age >= 40)
    assert (chosen == batch.answer)[far].float().mean() > 0.95


def test_tokens_are_words() -> None:
    pieces = testbed.tokenizer()
    assert pieces.vocab_size() == v.TEXT_CARD
    for number, word in enumerate(v.text_pieces(), start=v.FIRST_VALUE_TEXT):
        assert pieces.decode([number]) == word and pieces.encode(word) == [number]
    assert pieces.pad_id() == v.PADDING
    assert pieces.decode([4, v.PADDING, 5]) == f"{v.NAMES[0]} {v.NAMES[1]}"
    assert len(v.NAMES) == v.VALUES and len(v.FACTS) == v.KEYS and len(v.FILLERS) == v.WORDS
    assert (testbed.FOLDER / files.TOKENIZER_NAME).read_bytes() == tokenizer_model()


def test_there_is_no_mimi() -> None:
    with pytest.raises(FileNotFoundError, match="there-is-no-mimi"):
        testbed.checkpoint().get_mimi()


@pytest.mark.parametrize("name", ["hierarchical", "hybrid", "random"])
def test_shipped_adapters_are_what_the_recipe_gives(name: str, lm: LMModel) -> None:
    history = json.loads((testbed.adapter(name) / HISTORY).read_text())
    made = history["made"]
    arm = controls(CONTEXT, CONFIG["num_layers"], TESTBED_SETTINGS, CONTEXT)[name]
    recipe = arm.recipe or DEFAULT
    config = CacheConfig.from_fields(arm.lesson)
    expected = {"settings": described(lm, config), "recipe": recipe.made(), "base": base_hash(lm)}
    expected |= {"source": TestbedSource(*LESSONS).name, "seed": 0}
    assert made.items() >= json.loads(json.dumps(expected)).items()
    assert history["adapter"] == adapter_hash(testbed.adapter(name))


@pytest.mark.parametrize("name", sorted(p.name for p in (testbed.FOLDER / "adapters").iterdir()))
def test_shipped_adapters_fit(name: str) -> None:
    lm = testbed.load()
    handle = ttt_cache.load_adapter(lm, testbed.adapter(name))
    if name == "hierarchical":
        assert handle.layers == tuple(range(len(lm.transformer.layers)))
        assert handle.config.recent <= CONTEXT // 16
        sizes = report(lm)
        assert sizes.patched_bytes <= sizes.stock_bytes / 8


def test_an_adapter_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*hierarchical.*, got 'none'"):
        testbed.adapter("none")


@pytest.fixture(scope="module")
def make_testbed():
    path = Path(__file__).parents[1] / "benchmarks" / "make_testbed.py"
    spec = importlib.util.spec_from_file_location("make_testbed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(make_testbed, tmp_path: Path, monkeypatch):
    """The command, for a small base and adapters of a step, into a folder of `tmp_path`."""
    small = CONFIG | {"dim": 32, "num_layers": 1, "depformer_dim": 16}
    course = Course(((64, 1, 1),), lr=1e-3)

    def briefly(*given):
        arms = controls(*given)
        return {name: replace(arm, recipe=Recipe(course, course)) for name, arm in arms.items()}

    monkeypatch.setattr(make_testbed, "CONFIG", small)
    monkeypatch.setattr(files, "CONFIG", small)
    monkeypatch.setattr(make_testbed, "STAGES", ((24, 2, 3), (48, 1, 2)))
    monkeypatch.setattr(make_testbed, "LOGGED", 2)
    monkeypatch.setattr(make_testbed, "controls", briefly)

    def command(folder: str, seed: int, threads: int = 1) -> None:
        given = "--out", tmp_path / folder, "--seed", seed, "--threads", threads
        monkeypatch.setattr("sys.argv", ["make_testbed.py", *map(str, given)])
        make_testbed.main()

    return command


def test_one_command_makes_the_folder(make, make_testbed, tmp_path: Path, capsys) -> None:
    weights = []
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        make(folder, seed)
        weights.append(files.checkpoint(tmp_path / folder).get_moshi(dtype=torch.float32))
    made = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")}
    shipped = {path.relative_to(testbed.FOLDER) for path in testbed.FOLDER.rglob("*.*")}
    assert made == shipped
    for name in make_testbed.ADAPTERS:
        ttt_cache.load_adapter(weights[0], tmp_path / "a" / "adapters" / name).remove()
    states = [lm.state_dict() for lm in weights]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    described = json.loads((tmp_path / "c" / "config.json").read_text())["model_id"]
    assert described["seed"] == 6 and described["stages"] == [[24, 2, 3], [48, 1, 2]]
    assert "step 4 of 5" in capsys.readouterr().err


def test_an_interrupted_making_goes_on(make, make_testbed, tmp_path: Path, monkeypatch, capsys):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(make_testbed, "train_adapters", stop)
        with pytest.raises(KeyboardInterrupt):
            make("a", 5)
    weights = (tmp_path / "a" / files.WEIGHTS_NAME).read_bytes()
    assert "not trained again" not in capsys.readouterr().out
    monkeypatch.setattr(make_testbed, "train", stop)
    make("a", 5)
    assert "not trained again" in capsys.readouterr().out
    assert (tmp_path / "a" / files.WEIGHTS_NAME).read_bytes() == weights
    for name in make_testbed.ADAPTERS:
        base = files.checkpoint(tmp_path / "a").get_moshi(dtype=torch.float32)
        ttt_cache.load_adapter(base, tmp_path / "a" / "adapters" / name)
    with pytest.raises(KeyboardInterrupt):  # of another seed it is trained
        make("a", 6)
    for name, other in (("STAGES", ((24, 2, 4),)), ("CONFIG", CONFIG)):
        with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):
            changed.setattr(make_testbed, name, other)
            make("a", 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("file", 0), "--out must be a folder, got"),
        (("a", 0, 0), "--threads must be at least 1, got 0"),
        (("a", -1), "--seed must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_made_is_refused_first(given, message, make, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        make(*given)
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_writing_leaves_the_old_files(tmp_path: Path, monkeypatch) -> None:
    lm = tiny_lm()
    files.write(lm, tmp_path, {"seed": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(state, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        files.write(lm, tmp_path, {"seed": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
