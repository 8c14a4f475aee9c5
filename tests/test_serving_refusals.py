"""What `ttt-cache serve` refuses before it begins: a sentence, status 2, nothing left behind."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import moshi.client_utils  # noqa: F401 - before CliRunner lends its stderr: it keeps what it finds
import pytest
import torch
from launch_files import Checkpoint, add_model, add_speaker, write_config
from launch_support import free_port
from test_serving_process import arguments
from typer.testing import CliRunner

from ttt_cache.cli import main
from ttt_cache.serving import opus_process
from ttt_cache.serving.listen import bound
from ttt_cache.serving.room import room_for
from ttt_cache.serving.sampling import check_lm_gen_config

TOO_MANY = 30_000_000_000_000  # rows, for which not even a list of their numbers has room


def call(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_what_is_refused_before_it_begins(small_moshi: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "cert.pem").write_text("none")
    (tmp_path / "key.pem").write_text("none")
    (tmp_path / "damaged").write_bytes(small_moshi.speech.read_bytes()[:1000])
    damaged = tmp_path / "damaged"
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        for more, said in (
            (["--port", busy], f"port {busy} of localhost is in use"),
            (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
            (["--host", "192.0.2.1"], "--host must be an address of this machine, got 192.0.2.1"),
            (["--ssl", tmp_path / "none"], "--ssl must be a folder with a certificate"),
            (["--ssl", tmp_path], "--ssl must be a folder with a certificate"),
            (["--sessions", tmp_path / "file"], "--sessions must be a folder, got"),
            (["--token", ""], "--token must be printable ASCII"),
            (["--host", ""], "--host must be a name or an address of this machine"),
            (["--host", "a..b"], "a..b:"),
            (["--rows", 0], "rows must be at least 1, got 0"),
            (["--memory", "nonsense"], "nonsense"),
            (["--ttt-cache", tmp_path / "none"], "--ttt-cache and --recent exclude each other"),
            (["--cfg-coef", 2], "--cfg-coef must be 1 for a model without conditions"),
            (["--recent", 11], "recent + chunk - 1 must be within the context 12"),
            (["--device", "nonsense"], "--device must be one of cpu"),
            (["--mimi-weight", damaged], f"--mimi-weight: {damaged} is damaged, or no Mimi"),
            (["--moshi-weight", damaged], f"--moshi-weight: {damaged} is damaged, or no Moshi"),
            (["--tokenizer", damaged], f"--tokenizer: {damaged} is damaged, or no text tokenizer"),
            (["--config-path", damaged], f"--config-path: {damaged} is not JSON"),
            (["--lora-weight", damaged], f"the config that goes with {damaged}, with lora: true"),
        ):
            result = call(*arguments(small_moshi, port), *more)
            assert result.exit_code == 2 and said in result.stderr, (more, result.output)
            assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda c: add_model(c, "mute", dep_q=0, n_q=2, delays=[0, 0, 0]), "dep_q = 0"),
        (add_speaker, "the model cannot be batched: Model expects conditioning"),
    ],
)
def test_models_that_cannot_be_batched(add: Any, said: str, small_moshi: Checkpoint) -> None:
    config = add(small_moshi)
    weights = small_moshi.folder / f"{config.stem}.safetensors"
    words = arguments(small_moshi, free_port(), "--moshi-weight", weights, config=config.name)
    result = call(*words)
    assert result.exit_code == 2 and said in result.stderr, result.output


@pytest.mark.parametrize("option", ["moshi", "mimi", "lora", "tokenizer", "config"])
def test_a_file_that_is_not_there(option: str, small_moshi: Checkpoint, tmp_path: Path) -> None:
    flag = {"tokenizer": "--tokenizer", "config": "--config-path"}.get(option, f"--{option}-weight")
    for path, what in ((tmp_path / "none", "is not there"), (tmp_path, "is a folder")):
        result = call(*arguments(small_moshi, free_port()), flag, path)
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert result.stderr == f"ttt-cache: {flag} must be a file, {path} {what}\n"


def test_no_memory_for_so_many_rows_leaves_nothing_behind(
    small_moshi: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen] = []
    spawn = opus_process._spawn

    def spawned() -> Any:
        ours, process = spawn()
        started.append(process)
        return ours, process

    monkeypatch.setattr(opus_process, "_spawn", spawned)
    port = free_port()
    result = call(*arguments(small_moshi, port), "--rows", TOO_MANY)
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"ttt-cache: there is no memory for {TOO_MANY} conversations on cpu: ")
    assert " MB" in last and last.endswith("choose fewer --rows")
    assert started and all(each.poll() is not None for each in started)
    assert not [each for each in threading.enumerate() if each.name.startswith("model")]
    for each in bound("localhost", port):
        each.close()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_memory_that_runs_out_while_rows_are_laid_out(error: Exception) -> None:
    cpu = torch.device("cpu")
    with (
        pytest.raises(ValueError, match=r"no memory for 7 .* 1\.50 MB.* fewer --rows"),
        room_for(7, 1_500_000, cpu),
    ):
        raise error
    with pytest.raises(RuntimeError, match="of another kind"), room_for(7, 1, cpu):
        raise RuntimeError("of another kind")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"use_samplin": False}, "lm_gen_config must hold only "),
        ({"cfg_coef": 3}, "lm_gen_config must hold only "),
        ({"on_text_hook": None}, "lm_gen_config must hold only "),
        ({"temp": "hot"}, "lm_gen_config.temp must be a number, got 'hot'"),
        ({"temp": True}, "lm_gen_config.temp must be a number, got True"),
        ({"top_k": 2.5}, "lm_gen_config.top_k must be a whole number, got 2.5"),
        ({"use_sampling": 0}, "lm_gen_config.use_sampling must be true or false, got 0"),
        ({"cfg_is_masked_until": 3}, "must be a list of whole numbers, got 3"),
        ({"cfg_is_masked_until": [0.5]}, "must be a list of whole numbers, got [0.5]"),
        ([["temp", 1]], "lm_gen_config must be an object, got "),
    ],
)
def test_settings_of_sampling_that_moshi_does_not_have(given: Any, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_lm_gen_config("--config-path: FILE", given)
    assert str(refused.value).startswith("--config-path: FILE: lm_gen_config")
    assert said in str(refused.value)


def test_settings_of_sampling_that_moshi_has() -> None:
    given = {"temp": 1, "temp_text": 0.5, "top_k": 9, "use_sampling": True, "check": False}
    given |= {"cfg_is_masked_until": [3], "support_out_of_sync": False}
    assert check_lm_gen_config("a config", given) == given
    assert check_lm_gen_config("a config", {"cfg_is_masked_until": None})


def test_they_are_judged_before_the_weights_are_loaded(
    small_moshi: Checkpoint, tmp_path: Path
) -> None:
    config, weights = tmp_path / "config.json", tmp_path / "damaged"
    plain = json.loads((small_moshi.folder / "config.json").read_text())
    write_config(config, plain | {"lm_gen_config": {"temp": "hot"}})
    weights.write_bytes(b"")
    words = ["--config-path", config, "--moshi-weight", weights, "--mimi-weight", weights]
    result = call(*arguments(small_moshi, free_port()), *words)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert result.stderr == (
        f"ttt-cache: --config-path: {config}: lm_gen_config.temp must be a number, got 'hot'\n"
    )
