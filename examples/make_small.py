"""Make what examples/cpu.yaml trains on: a small random Moshi and a few recordings, all in the real
formats. Nothing is downloaded.

    python examples/make_small.py          # writes out/small, a few seconds

The recordings say the clip speech.wav (Moshi, left channel), with pauses between, against seeded
tones (the user, right channel). Weights are random: this shows how training goes, not what Moshi
learns. The clip was made with espeak-ng 1.51 and sox 14.4.2:

    espeak-ng -v en-us -s 165 -w a.wav "Hello. I am a short clip of synthetic speech. \
Every eighty milliseconds of me becomes one frame, and what leaves the window is folded \
into a small memory."
    sox -D a.wav -r 24000 -c 1 -b 16 speech.wav
"""

import argparse
import copy
import json
import wave
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import _lm_kwargs, _mimi_config, get_mimi
from safetensors.torch import save_file

RATE, FRAME, CODES = 24_000, 1920, 64
TEXT = (
    "hello i am a short clip of synthetic speech every eighty milliseconds of me becomes one frame "
    "and what leaves the window is folded into a small memory"
)
WORDS = TEXT.split()


def read_clip():
    """The clip in whole frames, float32 [1, 1, T]."""
    with wave.open(str(Path(__file__).parent / "speech.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    clip = torch.from_numpy(samples / np.float32(32768))
    return clip[None, None, : len(clip) // FRAME * FRAME]


def make_moshi(folder, pieces):
    """A Moshi of two layers that hears and says two codebooks each."""
    config = _lm_kwargs | {
        "dim": 64, "num_heads": 2, "num_layers": 2, "text_card": pieces, "card": CODES,
        "n_q": 4, "dep_q": 2, "delays": [0, 0, 1, 0, 1], "context": 250,
        "depformer_dim": 32, "depformer_dim_feedforward": 64,
        "depformer_num_heads": 1, "depformer_num_layers": 1,
    }  # fmt: skip
    save_file(LMModel(**config).state_dict(), folder / "model.safetensors")
    # Moshi's loaders find a Mimi of another shape by this key.
    config["mimi_config_name"] = f"file://{(folder / 'mimi.json').resolve()}"
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def make_mimi(folder, clip):
    """Mimi with its own rates, strides and kernels, but narrow."""
    config = copy.deepcopy(_mimi_config)
    config["seanet"] |= {"dimension": 32, "n_filters": 4}
    config["quantizer"] = {
        "dimension": 16, "n_q": 4, "bins": CODES, "input_dimension": 32, "output_dimension": 32,
    }  # fmt: skip
    config["transformer"] |= {"d_model": 32, "num_heads": 2, "num_layers": 2}
    config["transformer"] |= {"dim_feedforward": 64, "input_dimension": 32}
    config["transformer"] |= {"output_dimensions": [32]}
    mimi = get_mimi(None, mimi_config=config, num_codebooks=4)
    fill_codebooks(mimi, clip)
    save_file(mimi.state_dict(), folder / "mimi.safetensors")
    (folder / "mimi.json").write_text(json.dumps(config, indent=2))


@torch.no_grad()
def fill_codebooks(mimi, clip):
    """Spread random code words where the clip's frames are: an untrained Mimi's are all zeros."""
    latent = mimi.encode_to_latent(clip, quantize=False)
    for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        residual = part.input_proj(latent)  # [1, D, T]
        for layer in list(part.vq.layers)[: part.n_q]:
            centre = residual.mean(dim=(0, 2))
            spread = residual.std(dim=(0, 2), correction=0)
            book = layer._codebook.embedding_sum  # [codes, D]; each was used once, so sum is mean
            book.copy_(centre + spread * torch.randn_like(book))
            residual = residual - layer.decode(layer.encode(residual))


def make_tokenizer(folder):
    """A text tokenizer of the clip's words; padding is piece 3, as in Moshi's. Returns its size."""
    path = folder / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 20), model_writer=file,
            vocab_size=60, pad_id=3, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(str(path)).vocab_size()


def make_recording(path, clip, random):
    """A stereo WAV and its transcript; returns its line of the manifest."""
    left, alignments, at = [], [], 0.0
    for _ in range(3):
        pause = np.zeros(int(random.uniform(0.5, 3) * RATE))
        start, each = at + len(pause) / RATE, len(clip) / RATE / len(WORDS)
        for number, word in enumerate(WORDS):  # evenly, for want of their real times
            begin = round(start + number * each, 3)
            alignments.append([word, [begin, round(begin + each, 3)], "SPEAKER_MAIN"])
        left += [pause, clip]
        at = start + len(clip) / RATE
    moshi = np.concatenate(left)
    times = np.arange(len(moshi)) / RATE
    tone = np.sin(2 * np.pi * random.uniform(80, 400) * times)
    user = 0.2 * tone + random.normal(0, 0.02, len(moshi))
    samples = np.stack([moshi, user], axis=1).clip(-1, 1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    path.with_suffix(".json").write_text(json.dumps({"alignments": alignments}))
    return json.dumps({"path": f"wavs/{path.name}", "duration": len(moshi) / RATE}) + "\n"


def make(folder):
    torch.manual_seed(0)
    random, clip = np.random.default_rng(0), read_clip()
    (folder / "wavs").mkdir(parents=True, exist_ok=True)
    make_moshi(folder, make_tokenizer(folder))
    make_mimi(folder, clip)
    for name, recordings in (("train", 8), ("eval", 2)):
        paths = [folder / "wavs" / f"{name}-{number}.wav" for number in range(recordings)]
        lines = [make_recording(path, clip[0, 0].numpy(), random) for path in paths]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    print(f"written: {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("out/small"))
    make(parser.parse_args().out)
