"""Let Moshi hear an hour, frame by frame; interrupt it whenever you like, and it goes on.

    python examples/make_small.py        # a small random Moshi, nothing is downloaded
    python examples/stream_an_hour.py    # 45,000 frames; stop it with Ctrl-C, or kill it
    python examples/stream_an_hour.py    # goes on from the last session saved, at most 30 s before

A real Moshi, with a memory that was trained:

    python examples/stream_an_hour.py --hf-repo kyutai/moshiko-pytorch-bf16 \
        --ttt-cache out/my-adapter --infile talk.wav --device cuda

In --out are what Moshi said (answer.wav, at the end), and the newest session. Its size is the same
after a minute and after an hour. The answer is the one that an uninterrupted run gives.
"""

import argparse
import hashlib
import os
import sys
import wave
from contextlib import contextmanager
from pathlib import Path

import sphn
import torch
from moshi.models.lm import LMGen
from moshi.models.loaders import CheckpointInfo
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import ttt_cache

RATE, FRAME = 24_000, 1920  # 12.5 frames a second
FILES = ("model.safetensors", "mimi.safetensors", "tokenizer.model", "config.json")


@contextmanager
def refusals(prefix=""):
    """What the user got wrong: one sentence on stderr and status 2, not a traceback."""
    try:
        yield
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"stream_an_hour.py: {prefix}{' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def hearing(file):
    """Whole frames of a file, `[1, 1, T]`, and a digest of the file by which it is known again."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    samples, _ = sphn.read(file, sample_rate=RATE)
    if samples.shape[1] < FRAME:
        raise ValueError(f"{file} must hold a frame (80 ms), got {samples.shape[1]} samples")
    return torch.from_numpy(samples[:1, : samples.shape[1] // FRAME * FRAME])[None], digest


def load(options):
    """A patched Moshi that generates, and its Mimi."""
    if options.hf_repo:
        info = CheckpointInfo.from_hf_repo(options.hf_repo)
    else:
        info = CheckpointInfo.from_hf_repo("none/needed", *(options.small / f for f in FILES))
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    mimi, model = info.get_mimi(options.device), info.get_moshi(options.device, dtype)
    with refusals():
        if options.ttt_cache:
            ttt_cache.load_adapter(model, options.ttt_cache)
        else:
            ttt_cache.patch(model, recent=options.recent, memory="cluster")  # needs no training
    ttt_cache.report(model)
    return LMGen(model, **info.lm_gen_config), mimi


def sessions(folder):
    """Saved sessions, oldest first; a name says after how many frames, and of what input."""
    return sorted(folder.glob("session-*.safetensors"))


def on_disk(file):
    """Only what is there after a power loss counts as said."""
    file.flush()
    os.fsync(file.fileno())


def save(gen, mimi, folder, frame, digest):
    """The new session is complete before the old one goes."""
    old = sessions(folder)
    ttt_cache.save_session(gen, folder / f"session-{frame:09}-{digest}.safetensors", mimi)
    for path in old:
        path.unlink()


def go_on(gen, mimi, folder, digest):
    """Restore the newest session; returns the frames that it has heard, and bytes that it said."""
    if not sessions(folder):
        return 0, 0
    newest, answer = sessions(folder)[-1], folder / "answer.s16"
    frame, _, heard = newest.stem.removeprefix("session-").partition("-")
    if heard != digest:
        raise ValueError(f"{newest} was begun with another --infile: give that, or another --out")
    ttt_cache.load_session(gen, newest, mimi)
    said = 2 * FRAME * max(int(frame) - max(gen.lm_model.delays), 0)
    held = answer.stat().st_size if answer.exists() else 0
    if held < said:
        raise ValueError(
            f"{answer} must hold the {said} bytes that {newest} has said, got {held}: remove "
            f"{folder} to begin again"
        )
    print(f"going on with {newest}")
    return int(frame), said


def hear(gen, mimi, chunk):
    """One frame in, `[1, 1, 1920]`; 16-bit samples of one frame out, none while delays fill."""
    tokens = gen.step(mimi.encode(chunk))
    if tokens is None:
        return b""
    return (mimi.decode(tokens[:, 1:])[0, 0].clamp(-1, 1) * 32767).short().cpu().numpy().tobytes()


def stream(gen, mimi, speech, digest, options):
    chunks = speech.to(options.device).split(FRAME, dim=2)  # the file starts again at its end
    frames, every = round(options.seconds * 12.5), max(round(options.save_every * 12.5), 1)
    columns = TimeElapsedColumn(), TextColumn("of about"), TimeRemainingColumn()
    bar = Progress(TextColumn("{task.completed}/{task.total} frames"), BarColumn(), *columns)
    with torch.no_grad(), mimi.streaming(1), gen.streaming(1):
        with refusals():
            done, said = go_on(gen, mimi, options.out, digest)
        with bar, (options.out / "answer.s16").open("ab") as answer:
            answer.truncate(said)
            task = bar.add_task("", total=frames, completed=done)
            for frame in range(done, frames):
                if frame > done and frame % every == 0:
                    on_disk(answer)
                    save(gen, mimi, options.out, frame, digest)
                answer.write(hear(gen, mimi, chunks[frame % len(chunks)]))
                bar.advance(task)


def finish(folder):
    """Give the answer the header of a WAV; the sessions have done their work."""
    with (folder / "answer.wav").open("wb") as file:
        with wave.open(file, "wb") as wav:
            wav.setparams((1, 2, RATE, 0, "NONE", ""))
            wav.writeframes((folder / "answer.s16").read_bytes())
        on_disk(file)
    for path in (*sessions(folder), folder / "answer.s16"):  # no session without what it said
        path.unlink()
    print(f"written: {folder / 'answer.wav'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hf-repo", help="a real Moshi instead of the small one")
    parser.add_argument("--small", type=Path, default=Path("out/small"), help="of make_small.py")
    parser.add_argument("--ttt-cache", help="folder or hub id of an adapter; else clusters")
    parser.add_argument("--recent", type=int, default=100, help="frames kept, without an adapter")
    parser.add_argument("--infile", default=str(Path(__file__).parent / "speech.wav"))
    parser.add_argument("--out", type=Path, default=Path("out/hour"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--save-every", type=float, default=30, help="seconds of audio")
    options = parser.parse_args()
    if not options.hf_repo and not (options.small / FILES[0]).exists():
        parser.error(f"{options.small} has no Moshi: run examples/make_small.py, or give --hf-repo")
    with refusals("--infile: "):
        speech, digest = hearing(options.infile)
    with refusals("--out: "):
        options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    try:
        stream(*load(options), speech, digest, options)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None
    finish(options.out)
