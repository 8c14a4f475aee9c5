"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import re
import wave
from functools import partial
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
from ttt_cache.demo import pair
from ttt_cache.presets import PRESETS

DOCS = Path(__file__).parents[1] / "docs"
CONTEXT = 24
SMALL = {"dim": 32, "num_heads": 2, "num_layers": 4, "context": 40, "text_card": 50}


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Demo models of a few kilobytes; Mimi keeps its size."""
    size = partial(pair.Size, dim=64, num_heads=2, text_card=50, context=CONTEXT)
    monkeypatch.setattr(pair, "Size", size)
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


def write_wav(path: Path, samples: int, channels: int = 1, rate: int = 24000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        tone = [int(9000 * ((7 * t) % 100 - 50) / 50) for t in range(samples)]
        file.writeframes(b"".join(v.to_bytes(2, "little", signed=True) * channels for v in tone))
    return path


def demo(out: Path, *arguments: object, recent: int | None = 8) -> tuple[dict, str]:
    window = [] if recent is None else ["--recent", recent]
    result = call("demo", *arguments, "--out", out, *window, "--chunk", 4, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png"]
    return json.loads((out / "demo.json").read_text()), result.stdout


def test_demo_with_the_shipped_clip(tmp_path: Path) -> None:
    found, printed = demo(tmp_path / "a" / "b", "--frames", 40, "--seed", 3)
    assert found["frames"] == 40 and found["seed"] == 3 and found["clip_frames"] == 119
    assert found["settings"]["recent"] == 8
    assert found["samples"]["frame"] == [0, 40]
    for name in ("stock", "patched"):
        figures = found[name]
        sizes = found["samples"][f"{name}_state_bytes"]
        assert figures["state_bytes_start"] == figures["state_bytes_end"] == sizes[0] == sizes[-1]
        assert f"{figures['state_bytes_end']:,}" in printed
        for span in ("first", "last"):
            median, p99 = figures[f"{span}_median_ms"], figures[f"{span}_p99_ms"]
            assert 0 < median <= p99
            assert f"{median:.2f} / {p99:.2f}" in printed
        assert figures["real_time_factor"] == pytest.approx(figures["last_median_ms"] / 80)
    # Same weights, same draws: nothing has left the window of 8 + 4 - 1 frames so far.
    assert found["frames_with_the_same_text"] >= 8 + 4 - 1
    assert "not quality of speech" in printed
    assert "less than the stock context" not in printed  # 40 frames, context 24


def test_demo_with_stereo_at_another_rate(tmp_path: Path) -> None:
    clip = write_wav(tmp_path / "stereo.wav", 16000, channels=2, rate=16000)
    found, printed = demo(tmp_path / "out", clip, "--frames", 20, "--memory", "mean")
    assert found["clip"] == "stereo.wav" and found["clip_frames"] == 12  # 1 s, whole frames of it
    assert "less than the stock context of 24" in printed


def test_demo_of_one_frame_with_the_depformer(tmp_path: Path) -> None:
    found, _ = demo(tmp_path, "--frames", 1, "--depformer")
    assert found["model"]["depformer_runs"] and found["frames_with_the_same_text"] == 1


def recent_of(preset: str) -> int | None:
    """What to give as `--recent` so that a preset fits the small models; `None`: its own."""
    return None if "recent" in PRESETS[preset].settings else 8


def settings_in(context: int, preset: str) -> dict[str, Any]:
    """The settings of a preset with `recent_of` it, in a model of that context."""
    settings = {"recent": 8} | PRESETS[preset].settings
    return settings | ({"recent": context} if settings["recent"] is None else {})


@pytest.mark.parametrize("preset", PRESETS)
def test_demo_of_every_preset(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.arange(8 * 12).view(1, 8, 12)  # Mimi does not depend on the preset
    monkeypatch.setattr("ttt_cache.demo.run.encode", lambda *_: codes)
    found, printed = demo(tmp_path, "--preset", preset, "--frames", 30, recent=recent_of(preset))
    settings = {"recent": 8} | PRESETS[preset].settings
    assert {name: found["settings"][name] for name in settings} == settings
    window = {0: "no window", None: "the whole context"}.get(
        settings["recent"], f"recent {settings['recent']}"
    )
    assert f"preset {preset}, {window}, memory {settings.get('memory', 'ttt-mlp')}" in printed
    # Equal as long as nothing has left the window; without one, not even then.
    equal = settings_in(CONTEXT, preset)["recent"]
    assert found["frames_with_the_same_text"] >= min(equal, CONTEXT)


def test_demo_is_reproducible(tmp_path: Path) -> None:
    from ttt_cache.demo.clip import encode, read_clip

    codes = [encode(read_clip(None)[..., : 10 * 1920], seed, "cpu") for seed in (0, 0, 1)]
    assert codes[0].shape == (1, 8, 10)
    assert codes[0].equal(codes[1]) and not codes[0].equal(codes[2])
    assert all(len(stream.unique()) > 1 for stream in codes[0][0])  # no codebook is at zero


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.wav"], "WAV must be a file to read, got missing.wav: No such file"),
        (["."], "WAV must be a file to read, got .: Is a directory"),
        (["text.wav"], "WAV must be a sound file, got text.wav"),
        (["empty.wav"], "WAV must be a sound file, got empty.wav"),
        (["no_rate.wav"], "WAV must be a sound file, got no_rate.wav"),
        (["huge_rate.wav"], "WAV must have a rate of 1000 to 768000 Hz, got 4000000000"),
        (["silent.wav"], "WAV must last 0.08 s (one frame) or longer, got 0.000 s"),
        (["short.wav"], "WAV must last 0.08 s (one frame) or longer, got 0.042 s"),
        (["--frames", "0"], "--frames must be at least 1, got 0"),
        (["--frames", "99999999999"], "--frames must be at most 10000000, got 99999999999"),
        (["--frames", "many"], "'--frames': must be a whole number, got 'many'"),
        (["--recent", "0"], "recent=0 and read='virtual' exclude each other: without a window"),
        (["--recent", "-1"], "recent must be at least 0, got -1"),
        (["--preset", "bank"], "preset must be one of memory-bank, hierarchical"),
        (["--preset", "ttt-window", "--memory", "mean"], "read='query' and memory='mean' exclude"),
        (["--recent", "24"], "recent + chunk - 1 must be within the context 24"),
        (["--memory", "brain"], "memory must be one of ttt-mlp"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--device", "abacus"], "--device must be one of cpu"),
        (["--out", "text.wav", "--recent", "8"], "--out must be a folder, got text.wav"),
    ],
)
def test_demo_refuses(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "empty.wav").touch()
    write_wav(tmp_path / "silent.wav", 0)
    write_wav(tmp_path / "short.wav", 1000)
    for name, rate in (("no_rate", 0), ("huge_rate", 4_000_000_000)):
        header = bytearray((tmp_path / "short.wav").read_bytes())
        header[24:28] = rate.to_bytes(4, "little")
        (tmp_path / f"{name}.wav").write_bytes(header)
    before = sorted(tmp_path.iterdir())
    refused(call("demo", *arguments), says)
    assert sorted(tmp_path.iterdir()) == before


def refused(result: Result, says: str) -> None:
    assert result.exit_code == 2
    assert says in plain(result.stderr)
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_an_interrupted_demo_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ttt_cache.demo.conversation import Arm

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Arm, "step", interrupt)
    result = call("demo", "--out", tmp_path, "--recent", 8)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []


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
        ("demo", "frames preset recent virtual chunk memory depformer seed threads device out"),
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
    assert "[default: (memory-bank)]" in rows["preset"] and not PRESETS["memory-bank"].settings


def test_the_root_lists_its_commands_and_its_version() -> None:
    text = plain(call("--help").stdout)
    assert all(word in text for word in ("demo", "report", "--version", "Start with"))
    assert call("--version").stdout == f"ttt-cache {__version__}\n"
    assert call("sing").exit_code == 2
