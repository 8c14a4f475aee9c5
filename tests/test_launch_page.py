"""What docs/launch.md says of processes, of lines on stderr and of a small checkpoint is so."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch_files import EXAMPLES, Checkpoint
from launch_support import LAUNCH, LOAD, ROOT, SMALL, call, ended

PROCESSES = """
import multiprocessing
def child(folder):
    print(type(load(folder).transformer.layers[0].self_attn).__name__)
if __name__ == "__main__":
    for how in ("fork", "spawn"):
        process = multiprocessing.get_context(how).Process(target=child, args=[{0!r}])
        process.start()
        process.join()
"""


def test_a_forked_process_has_the_cache_and_a_spawned_one_not(
    script: Callable[..., str], small_moshi: Checkpoint, tmp_path: Path
) -> None:
    name = script(LOAD + PROCESSES.format(str(small_moshi.folder)))
    status, stdout, stderr = ended(*LAUNCH, *SMALL, name, cwd=tmp_path)
    assert stdout.split() == ["PatchedAttention", "StreamingMultiheadAttention"], stderr
    assert status == 3 and "in its own process: no cache was installed" in stderr


def test_each_model_gets_the_lines_that_the_page_lists(
    script: Callable[..., str], small_moshi: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name = script(f"{LOAD}load({str(small_moshi.folder)!r})\n")
    layers, cpu = "ttt-cache: layers 0-1", "ttt-cache: there is no CUDA on this machine:"
    untrained = "ttt-cache: memory ttt-mlp is untrained;"
    for words, lines in (([], [untrained, layers, cpu]), (["--memory", "none"], [layers, cpu])):
        told = call(*SMALL[:4], *words, name).stderr.splitlines()
        assert len(told) == len(lines) and all(map(str.startswith, told, lines)), told


@pytest.mark.parametrize("program", ["moshi.run_inference", "moshi.server"])
def test_the_pages_commands_for_a_small_checkpoint(
    program: str, small_moshi: Checkpoint, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "launch.md").read_text().partition("## On a small checkpoint")[2]
    block = page.partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ")
    flags = re.findall(r'SMALL="(.*?)"', block, re.DOTALL)[0]
    command = next(line for line in block.splitlines() if program in line and "launch" in line)
    command = command.replace("$SMALL", flags).replace(
        "examples/speech.wav", "out/small/speech.wav"
    )
    command = command.replace("out/small", str(small_moshi.folder))
    words = shlex.split(command.replace("out.wav", str(tmp_path / "out.wav")))
    assert words[:5] == ["ttt-cache", "launch", "--memory", "cluster", program]
    # This checkpoint's context has no room for chunks of 8; and a server would serve without end.
    options = ["--memory", "none", "--recent", 6]
    helped = ["--help"] if program == "moshi.server" else []
    result = call(*options, *words[4:], *helped)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.wav").exists() == (not helped)
    if helped:
        assert all(word in result.stdout for word in words[5:] if word.startswith("--"))


def test_the_example_that_patches_by_itself_is_not_to_be_launched(
    small_moshi: Checkpoint, tmp_path: Path
) -> None:
    words = ["--small", small_moshi.folder, "--out", tmp_path, "--device", "cpu"]
    result = call(*SMALL, EXAMPLES / "stream_an_hour.py", *words)
    assert result.exit_code == 2 and "is patched already" in result.stderr.splitlines()[-1]
