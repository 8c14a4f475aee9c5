"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import ttt_cache
from ttt_cache import CacheConfig, __version__
from ttt_cache.cli import main
from ttt_cache.cli.options import parse_layers
from ttt_cache.cli.presets import compact, page
from ttt_cache.config import CHOICES
from ttt_cache.presets import PRESETS

DOCS = Path(__file__).parents[1] / "docs"
SMALL = {"dim": 32, "num_heads": 2, "num_layers": 4, "context": 40, "text_card": 50}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A Moshi config.json with keys that are not LMModel's, as in Kyutai's repositories."""
    from moshi.models.loaders import _lm_kwargs

    extra = {"moshi_name": "x.safetensors", "lm_gen_config": {"temp": 0.7}, "lora": False}
    depth = {"depformer_dim": 16, "depformer_num_heads": 1, "depformer_num_layers": 1}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_lm_kwargs | SMALL | depth | extra))
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def recent_of(preset: str) -> int | None:
    """What to give as `--recent` so that a preset fits the small models; `None`: its own."""
    return None if "recent" in PRESETS[preset].settings else 8


def settings_in(context: int, preset: str) -> dict[str, Any]:
    """The settings of a preset with `recent_of` it, in a model of that context."""
    settings = {"recent": 8} | PRESETS[preset].settings
    return settings | ({"recent": context} if settings["recent"] is None else {})


def refused(result: Result, says: str) -> None:
    assert result.exit_code == 2
    assert says in plain(result.stderr)
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    from ttt_cache.files import write_whole

    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    for path in (first, second):
        write_whole({path: lambda path: path.write_text("old")})

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole({first: lambda path: path.write_text("new"), second: fail})
    assert first.read_text() == second.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_report_of_moshi_7b() -> None:
    result = call("report", "--layers", "25-31", "--batch-size", 2)
    assert result.exit_code == 0, result.output
    assert "batch size 2" in result.stdout
    assert "0-24, each (stock)" in result.stdout and "25-31, each" in result.stdout
    assert "3,145.7" in result.stdout  # two rings of 32 x 3000 x 4096 x 2 x 2 bytes


@pytest.mark.parametrize(
    ("layers", "patched", "stock"),
    [
        ("all", ["0-3, each "], []),
        ("1-2", ["1-2, each "], ["0 (stock)", "3 (stock)"]),
        ("0,2-3", ["0 ", "2-3, each "], ["1 (stock)"]),
        ("-1", ["3 "], ["0-2, each (stock)"]),
    ],
)
def test_report_of_layers(
    layers: str, patched: list[str], stock: list[str], config_file: Path
) -> None:
    result = call("report", "--config-path", config_file, "--layers", layers, "--recent", 8)
    assert result.exit_code == 0, result.output
    rows = [row for row in result.stdout.splitlines() if "│" in row and "total" not in row]
    labels = [row.split("│")[1].strip() for row in rows]
    assert sorted(labels) == sorted(label.strip() for label in patched + stock)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "4"], "layers must be between -4 and 3 for a transformer of 4 layers, got 4"),
        (["--layers", "top"], "--layers must be 'all', layers or spans"),
        (["--layers", "3-1"], "--layers must name spans upwards"),
        (["--layers", "0-99999999999"], "of at most 1000 layers"),
        (["--layers", "1,1"], "layers must name each layer once, got 1"),
        (["--layers", ""], "--layers must be 'all'"),
        (["--recent", "-5"], "recent must be at least 0, got -5"),
        (["--recent", "40"], "recent + chunk - 1 must be within the context 40"),
        (["--preset", "bank"], "preset must be one of memory-bank, hierarchical"),
        (["--preset", "cluster", "--read", "query"], "read='query' and memory='cluster' exclude"),
        (["--preset", "ttt-mlp-layer", "--sinks", "4"], "recent=0 and sinks=4 exclude each other"),
        (["--memory", "ttt-linear", "--depth", "3"], "memory='ttt-linear' and depth=3 exclude"),
        (["--memory", "none", "--recent", "0"], "recent=0 and memory='none' exclude each other"),
        (["--read", "aloud"], "read must be one of virtual, query, got 'aloud'"),
        (["--write", "late"], "write must be one of evicted, arrived, got 'late'"),
        (["--source", "air"], "source must be one of hidden, kv, output, got 'air'"),
        (["--depth", "4"], "depth must be 2 or 3, got 4"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--batch-size", "2.5"], "'--batch-size': must be a whole number, got '2.5'"),
        (["--config-path", "none.json"], "--config-path none.json cannot be read as JSON"),
        (["--config-path", "list.json"], "--config-path list.json must hold a JSON object"),
        (["--config-path", "odd.json"], "--config-path does not describe a Moshi model"),
    ],
)
def test_report_refuses(
    arguments: list[str],
    says: str,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("odd.json").write_text('{"dim": 32, "wheels": 4}')
    given = [] if "--config-path" in arguments else ["--config-path", config_file]
    refused(call("report", *given, *arguments), says)


def reported(*arguments: object) -> tuple[str, str]:
    """The totals of a report, stock and patched, as printed."""
    result = call("report", *arguments)
    assert result.exit_code == 0, result.output
    (total,) = (row for row in result.stdout.splitlines() if "total" in row)
    _, _, stock, patched, *_ = (cell.strip() for cell in total.split("│"))
    return stock, patched


@pytest.mark.parametrize("preset", PRESETS)
def test_report_of_every_preset(preset: str, config_file: Path) -> None:
    size = ["--config-path", config_file, "--memory-dim", 8, "--hidden-dim", 16, "--batch-size", 99]
    recent = recent_of(preset)
    own = [] if recent is None else ["--recent", recent]
    by_name = reported(*size, *own, "--preset", preset)
    # The same system from its single settings; gates and resets hold no bytes and have no options.
    settings = settings_in(SMALL["context"], preset)
    names = settings.keys() - {"gate", "reset_memory"}
    assert reported(*size, *(f"--{name}={settings[name]}" for name in names)) == by_name


def test_overrides_of_a_preset_count(config_file: Path) -> None:
    def patched(*arguments: object) -> float:
        return float(reported("--config-path", config_file, *arguments)[1])

    linear = patched("--preset", "ttt-linear-layer")
    assert patched("--preset", "ttt-linear-layer", "--memory", "ttt-mlp") > linear
    deep = patched("--preset", "ttt-mlp-layer", "--depth", 3)
    assert deep > patched("--preset", "ttt-mlp-layer") > linear
    assert patched("--preset", "hybrid", "--recent", 8) < patched("--preset", "hybrid")


@pytest.mark.parametrize("others", [[], ["--recent", "5"], ["--preset", "bank"]])
def test_presets_are_listed_whatever_else_is_asked(others: list[str]) -> None:
    result = call("report", *others, "--presets")
    assert result.exit_code == 0 and result.stderr == ""
    rows = [
        [cell.strip() for cell in row.split("│")[1:-1]] for row in plain(result.stdout).split("\n")
    ]
    for name, preset in PRESETS.items():
        assert [name, preset.about, compact(preset)] in rows
        assert [preset.section, page(preset.section), ""] in rows
    assert compact(PRESETS["memory-bank"]) == "the defaults"
    assert compact(PRESETS["streaming-llm"]) == "memory=none sinks=4"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_page_of_presets_has_every_preset(preset: str) -> None:
    text = (DOCS / "presets.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{preset}` |"))
    assert row.split("|")[2].strip().strip("`") == compact(PRESETS[preset])
    (section,) = re.findall(rf"^## {PRESETS[preset].section}\n(.*?)(?=^## )", text, re.M | re.S)
    assert f"`{preset}`" in section


def test_the_page_of_presets_has_the_sizes_of_moshi_7b() -> None:
    from moshi.models.loaders import get_moshi_lm

    text = (DOCS / "presets.md").read_text(encoding="utf-8")
    model = get_moshi_lm(None, device="meta", dtype=torch.bfloat16)
    for preset in PRESETS:
        with ttt_cache.patch(model, preset=preset):
            size = ttt_cache.report(model).patched_bytes
        assert re.search(rf"^\| `{preset}` \|[^|]*\| {size / 1e6:,.2f} \|", text, re.M), size


def test_layers_as_text() -> None:
    assert parse_layers("all") is None
    assert parse_layers("0, 3,25-27,-1") == (0, 3, 25, 26, 27, -1)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", "frames seed threads device out"),
        ("launch", "ttt-cache layers preset recent virtual chunk sinks memory"),
        (
            "serve",
            "rows host port token ssl sessions save-every keep idle hf-repo moshi-weight "
            "mimi-weight tokenizer lora-weight config-path cfg-coef device half "
            "ttt-cache layers preset recent virtual chunk sinks memory ray replicas",
        ),
        (
            "report",
            "layers preset recent virtual chunk sinks memory source read write memory-heads "
            "memory-dim hidden-dim depth batch-size config-path presets",
        ),
    ],
)
def test_help_names_every_option_and_the_defaults_of_the_library(
    command: str, options: str
) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    text = plain(result.stdout)
    rows = dict(re.findall(r"^│ --([a-z-]+) +(.*?)(?=^│ --|^╰)", text, re.M | re.S))
    assert rows.keys() == {*options.split(), "help"}
    assert "Example: ttt-cache " + command in text
    config = CacheConfig()
    for option in options.split():
        default = getattr(config, option.replace("-", "_"), None)
        if default is not None and option != "layers":
            assert f"[default: ({default})]" in rows[option]
        if option in CHOICES:
            assert all(re.search(rf"\b{choice}\b", rows[option]) for choice in CHOICES[option])
    if "preset" in rows:
        assert "[default: (memory-bank)]" in rows["preset"]
        assert not PRESETS["memory-bank"].settings


def test_the_root_lists_its_commands_and_its_version() -> None:
    text = plain(call("--help").stdout)
    assert all(word in text for word in ("demo", "report", "launch", "--version", "Start with"))
    assert call("--version").stdout == f"ttt-cache {__version__}\n"
    assert call("sing").exit_code == 2
