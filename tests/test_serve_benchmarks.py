"""`benchmarks/serve_*.py` on a CPU, short: they run, and their files have what the docs quote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
GROWTH = "server: growth from tenth to last"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import what stands beside them."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def ran(script: str, result: Path, *words: object) -> dict[str, Any]:
    """What a benchmark writes to a file."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, words)]
    done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(result.read_text())


def figures(record: dict[str, Any]) -> dict[str, Any]:
    assert "commit" in record["library"] and record["versions"]["torch"]
    return {line["name"]: line["value"] for line in record["figures"]}


def test_a_soak_of_a_minute_of_speech(tmp_path: Path) -> None:
    frames, result = 50, tmp_path / "soak.json"
    record = ran("serve_soak.py", result, "--frames", frames, "--out", result)
    verdicts = {line["name"]: line["verdict"] for line in record["figures"]}
    assert verdicts.pop("frames of each conversation") == "MISSED", "it is no soak"
    # So short a run has not grown to its size yet; and how rows round is a CPU's own affair.
    allowed = ("server: growth", "file desc", "of which differ", "voices")
    other = [name for name, verdict in verdicts.items() if verdict == "MISSED"]
    assert all(name.startswith(allowed) for name in other), other
    found = figures(record)
    assert found["frames sent, all"] == 8 * frames
    assert found["messages held against the twin's"] >= 4 * (frames - 1)
    assert found["server: memory in the last tenth"] > 100 > found[
        "workers: memory in the last tenth"] > 0  # fmt: skip
    assert 1 <= found["rows that shared a step, mean"] <= 8
    assert result.with_suffix(".md").read_text().count("\n") == 2 + len(found)


def forged() -> tuple[Any, dict[str, Any]]:
    """A soak in which all went well."""
    from soak_clients import Crowd, Talk, Twins

    crowd = Crowd("", 90_000, None, ["pcm"], [0, 0])  # type: ignore[arg-type]
    crowd.talks = [Talk("pcm", 90_000, 89_999, texts=1, digest=5) for _ in range(2)]
    crowd.twins = [Twins(89_999)]
    looks, others = [], {"workers_mb": 30.0, "files": 20}
    for at in range(1, 101):
        looks.append({"answered": 1800 * at, **others, "server_mb": 700.0 if at > 10 else 0.0})
    names = {"frames_total": 180_000, "step_seconds_sum": 90.0, "step_seconds_count": 90_000}
    metrics = {f"ttt_cache_{name}": str(value) for name, value in names.items()}
    return crowd, {"looks": looks, "metrics": metrics, "seconds": 60.0, "status": 0}


def missed(crowd: Any, log: dict[str, Any]) -> list[str]:
    from soak_lines import lines_of

    return [line.name for line in lines_of(crowd, log) if line.verdict == "MISSED"]


def test_a_soak_is_judged_by_its_figures() -> None:
    from soak_lines import lines_of

    found = {line.name: line.value for line in lines_of(*forged())}
    assert found[GROWTH] == 0 and found["step of all rows, mean"] == pytest.approx(1)
    assert missed(*forged()) == [], "what grows in the first tenth is warm-up"
    for change, name in (
        (lambda crowd, log: log["looks"][-1].update(server_mb=800.0), GROWTH),
        (lambda crowd, log: log["looks"][-1].update(files=21),
         "file descriptors, last less first"),
        (lambda crowd, log: log["metrics"].update(ttt_cache_frames_total="180001"),
         "frames that the server stepped, less those"),
        (lambda crowd, log: log.update(status=1), "exit status of the server"),
        (lambda crowd, log: setattr(crowd.talks[0], "answered", 90_000),
         "answers too few or too many, all"),
        (lambda crowd, log: setattr(crowd.talks[1], "remainder", 1),
         "samples that are no whole frame"),
        (lambda crowd, log: setattr(crowd.talks[1], "ended", "closed"),
         "connections closed by the server"),
        (lambda crowd, log: setattr(crowd.talks[1], "digest", 6),
         "voices that were answered differently"),
    ):  # fmt: skip
        crowd, log = forged()
        change(crowd, log)
        assert missed(crowd, log) == [name]


def test_twins_are_compared_message_by_message() -> None:
    from soak_clients import Twins

    twins = Twins()
    for twin, message in ((0, b"a"), (0, b"b"), (1, b"a"), (1, b"c"), (1, b"d"), (0, b"d")):
        twins.heard(twin, message)
    assert (twins.compared, twins.differ, twins.first) == (3, 1, 1) and not twins.unmatched


def test_attacks_in_seconds(tmp_path: Path) -> None:
    words = ("--out", tmp_path, "--share", 0.01, "--hold", 1, "--clients", 1, "--spare", 1)
    record = ran("serve_attack.py", tmp_path / "attack.json", *words)
    assert record["status"] == 0
    lines = {line["attack"]: line for line in record["attacks"]}
    malformed = lines["malformed"]["ended"]
    assert sum(malformed.values()) == 2 and set(malformed) <= {"close 1007", "closed"}
    assert lines["oversized"]["ended"].keys() <= {"close 1009", "closed"}
    assert lines["wrong tokens"]["ended"] == {"401": 20}
    assert lines["attempts when full"]["ended"] == {"503": 100}
    assert sum(line["frames"] for line in lines.values()) > 0, "somebody talks"
    for line in lines.values():
        assert line["late"] <= line["frames"] and 0 <= line["idle"] <= 1
        assert min(line["memory_mb"]) > 100 and min(line["files"]) > 0
    assert (tmp_path / "attack.md").read_text().count("\n") == 2 + len(lines)


def test_frames_belong_to_the_attack_in_which_they_were_said() -> None:
    from serve_attack import finish

    lines = [{"began": 10.0, "seconds": 5.0}, {"began": 20.0, "seconds": 1.0}]
    said = [(9.9, 9.0), (10.0, 0.08), (12.0, 0.081), (14.9, 0.1), (15.0, 7.0), (19.0, 8.0)]
    finish(lines, said)
    assert lines[0] == {"began": 10.0, "seconds": 5.0, "frames": 3, "late": 2, "worst_ms": 100.0}
    assert (lines[1]["frames"], lines[1]["late"], lines[1]["worst_ms"]) == (0, 0, None)


@pytest.mark.parametrize("words", [[], ["--codec", "opus", "--workers", 1]], ids=["stub", "opus"])
def test_overhead_of_some_frames(words: list[object], tmp_path: Path) -> None:
    result = tmp_path / "overhead.json"
    short = ("--clients", 2, "--frames", 40, "--step-ms", 1, "--out", result)
    record = ran("serve_overhead.py", result, *short, *words)
    found, log = figures(record), record["log"]
    assert found["frames, each answered to its client and in order"] == 40 == log["frames"]
    assert found["server: processor time of a frame"] == log["server_s"] / 40 * 1e3 > 0
    assert found["workers: processor time of a frame"] == log["workers_s"] / 40 * 1e3
    assert (log["workers_s"] > 0) == bool(words)
    assert 1 <= found["rows that shared a step, mean"] <= 2
    assert found["server: memory at the end"] == log["memory_mb"][-1] > 100
