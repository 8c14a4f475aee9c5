"""`ttt-cache serve --ray` by a file of Serve's: its options are those of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import torch

from ttt_cache.cli.serve_app import app_builder


def test_options_are_read_as_the_commands(tmp_path: Path) -> None:
    asked = {"replicas": 2, "rows": "64", "save-every": 5, "memory": "cluster", "half": True}
    application = app_builder(asked | {"sessions": str(tmp_path), "device": "cpu", "ssl": None})
    deployment = application._bound_deployment
    (work,) = deployment.init_args
    assert deployment.num_replicas == 2 and deployment.ray_actor_options["num_gpus"] == 0
    assert (work.options.rows, work.options.save_every) == (64, 5.0)
    assert work.options.sessions == tmp_path and work.files.dtype is torch.float16


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"rows": 2.5}, "'--rows': must be a whole number, got '2.5'"),
        ({"save_every": 0}, "'--save-every'"),
        ({"port": 99_999}, "'--port'"),
        ({"keep": "x"}, "'--keep'"),
        ({"half": "false"}, "'--half' does not take a value"),
        ({"nope": 1}, "No such option: --nope"),
    ],
)
def test_options_are_refused_as_the_commands(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        app_builder(args)
