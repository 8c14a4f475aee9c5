"""What the tests of sessions run in processes of their own."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from models import tiny_lm
from session_support import frames, moshi, say, talk

import ttt_cache

ROUNDS = 25


def go_on(file: str, start: int) -> None:
    """Print what the model of `test_another_process_goes_on` says from a session on."""
    gen = talk(moshi({"layers": [0, 2]}), 2)
    codes = frames(gen.lm_model, 38, 2)
    ttt_cache.load_session(gen, file)
    print(json.dumps([tokens.tolist() for tokens in say(gen, codes[:, :, start:])]))


def kill_while_saving(folder: Path) -> None:
    """Kill processes that save in a loop: the file is always one that was written whole."""
    torch.manual_seed(0)
    gen = talk(tiny_lm(context=4000, num_layers=2), 2)  # a file of 8 MB takes its time
    codes = frames(gen.lm_model, 4, 2)
    file, whole = folder / "talk.safetensors", set()
    for steps in (2, 2):
        say(gen, codes[:, :, :steps])
        whole.add(ttt_cache.save_session(gen, file).read_bytes())
    both = []
    for number, contents in enumerate(whole):
        both.append(folder / f"{number}.whole")
        both[-1].write_bytes(contents)
    chance = random.Random(0)
    for _ in range(ROUNDS):
        child = os.fork()
        if child == 0:
            while True:
                for path in both:
                    ttt_cache.load_session(gen, path)
                    ttt_cache.save_session(gen, file)
        time.sleep(chance.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ttt_cache.load_session(gen, file)
        assert file.read_bytes() in whole
    print(len(list(folder.glob(".*"))))  # what was interrupted lies there under other names


if __name__ == "__main__":
    if sys.argv[1] == "go-on":
        go_on(sys.argv[2], int(sys.argv[3]))
    else:
        kill_while_saving(Path(sys.argv[2]))
