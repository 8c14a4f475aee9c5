"""What the operator of a server reads in its log."""

from __future__ import annotations

import logging
import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ttt_cache.serving import trouble
from ttt_cache.serving.logs import log_lines
from ttt_cache.serving.sessions import Sessions, new_name
from ttt_cache.serving.trouble import QUIET_S, Trouble

FULL = OSError("no space left")


class Said(logging.Handler):
    """What was logged, and when, in made-up time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.lines = 1000.0, list[tuple[float, str]]()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((self.now, f"{record.levelname} {record.getMessage()}"))


def troubled(monkeypatch: pytest.MonkeyPatch) -> tuple[Said, Trouble]:
    said, log = Said(), logging.Logger("a log")
    log.addHandler(said)
    monkeypatch.setattr(trouble, "time", SimpleNamespace(monotonic=lambda: said.now))
    return said, Trouble(log, "it fails", "it works again")


def test_a_thousand_failures_are_a_line_a_minute_and_one_when_it_works(monkeypatch) -> None:
    said, each = troubled(monkeypatch)
    each.worked()
    for _ in range(1000):
        each.failed(FULL)
        said.now += 0.125
    each.worked()
    each.worked()
    assert [line for _, line in said.lines] == [
        "ERROR it fails: no space left",
        "ERROR it fails (and 479 times since this was last said): no space left",
        "ERROR it fails (and 479 times since this was last said): no space left",
        "WARNING it works again (after 39 more failures)",
    ]
    said.now += QUIET_S
    each.failed(FULL)
    assert said.lines[-1][1] == "ERROR it fails: no space left"


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 5.0, 61.0])), max_size=60))
def test_whatever_comes_and_goes(events: list[tuple[bool, float]]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        said, each = troubled(patched)
        for fails, seconds in events:
            each.failed(FULL) if fails else each.worked()
            said.now += seconds
    failed = [at for at, line in said.lines if "fails" in line]
    assert all(b - a >= QUIET_S for a, b in pairwise(failed))
    kinds = ["fails" in line for _, line in said.lines]
    assert all(a or b for a, b in pairwise(kinds)), "said once that it works"
    assert bool(failed) is any(fails for fails, _ in events)


def test_lines_have_time_and_level(monkeypatch, capsys) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    log_lines()
    logging.getLogger("ttt_cache.serving.saving").error("no %s", "space")
    said = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ERROR no space\n", said), said


def test_a_damaged_session_is_named_by_the_file_that_lies_there(tmp_path) -> None:
    store, name = Sessions(tmp_path, 3600), new_name()
    session: Any = {"x": torch.zeros(9)}, {"identity": {}, "conversations": 1, "whole_batch": False}
    store.write(store.first(name), session)
    path = store.take(name)[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated") as refused:
        store.take(name)
    (lies_there,) = tmp_path.iterdir()
    assert str(refused.value).startswith(f"{lies_there} is truncated")
