"""Train the memory of a patched Moshi in your own loop, with plain PyTorch.

Codes are made up here: a word comes back every 16 frames, after a cue and with noise in between,
and the window holds 13 frames at most. So whoever predicts the word has remembered it. For your
own recordings put Mimi's codes, [B, 1 + n_q, T], in place of `make_batch`.
"""

import argparse

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo, _lm_kwargs
from torch.nn import functional as F

import ttt_cache

PERIOD, FRAMES, ROWS = 16, 64, 16
SMALL = {"dim": 64, "num_heads": 2, "num_layers": 2, "n_q": 2, "dep_q": 2, "delays": [0] * 3}
SMALL |= {"card": 64, "text_card": 64, "depformer_dim": 32, "depformer_num_heads": 1}
SMALL |= {"depformer_num_layers": 1, "depformer_dim_feedforward": 64}
WINDOW = {"recent": 6, "chunk": 8, "virtual": 4, "memory_dim": 16, "hidden_dim": 32}


def make_batch(model):
    """Codes [B, 1 + n_q, T]: noise in the lower half of the codes, words in the upper half."""
    half = model.card // 2
    codes = torch.randint(1, half, (ROWS, model.num_codebooks, FRAMES))
    codes[..., ::PERIOD] = 0  # the cue
    codes[..., 1::PERIOD] = torch.randint(half, 2 * half, (ROWS, model.num_codebooks, 1))
    return codes.to(model.device)


def loss_of(model, codes):
    """Cross-entropy of the words that come back, text and audio: the first one is news."""
    out, where = model(codes), slice(PERIOD + 1, None, PERIOD)
    logits, text_logits = out.logits[:, :, where], out.text_logits[:, :, where]
    audio = F.cross_entropy(logits.flatten(0, 2), codes[:, 1 : 1 + model.dep_q, where].flatten())
    return audio + F.cross_entropy(text_logits.flatten(0, 2), codes[:, :1, where].flatten())


def train(model, parameters, steps, lr):
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        loss = loss_of(model, make_batch(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def tell(name, model):
    with torch.no_grad():
        losses = [loss_of(model, make_batch(model)) for _ in range(4)]
    print(f"{name:34} loss {torch.stack(losses).mean():.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hf-repo", help="a real Moshi instead of a small one made here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=150, help="of each training")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.hf_repo:
        model = CheckpointInfo.from_hf_repo(options.hf_repo).get_moshi(options.device)
    else:  # there is no small Moshi to download: teach one the task first, with full context
        model = LMModel(**_lm_kwargs | SMALL, device=options.device).eval()
        train(model, model.parameters(), options.steps, lr=3e-3)
    tell("full context", model)

    model.requires_grad_(False)
    handle = ttt_cache.patch(model, **WINDOW)
    for cache in handle.caches.values():
        cache.float()  # bfloat16 would round small updates away
    tell("patched: a window of 6 to 13", model)
    ttt_cache.distill(model, [(make_batch(model),) for _ in range(options.steps)])
    tell("memory distilled", model)
    train(model, ttt_cache.adapter_parameters(model), options.steps, lr=3e-3)
    tell("memory trained on the loss", model)
    ttt_cache.save_adapter(model, "out/my-adapter")  # ttt_cache.load_adapter reads it
