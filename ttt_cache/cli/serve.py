"""`ttt-cache serve`: many conversations with one Moshi, for Moshi's own clients."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import fail, reason, refusals
from .launch import Adapter, Layers, installer
from .options import Chunk, Memory, Preset, Recent, Sinks, Virtual, number

FilePath = Annotated[str | None, typer.Option(metavar="FILE", help="As for moshi.server.")]


def _seconds(help_text: str) -> Any:
    return typer.Option(metavar="SECONDS", min=0.1, help=help_text)


def serve(
    rows: Annotated[int, number("Conversations at once, at least 1.")] = 8,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8998,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="TTT_CACHE_TOKEN", help="What clients must show; better in the environment."
        ),
    ] = None,
    ssl: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="With cert.pem and key.pem: serve https and wss."),
    ] = None,
    sessions: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Save conversations there, to be gone on with."),
    ] = None,
    save_every: Annotated[float, _seconds("Save each conversation so often.")] = 30.0,
    keep: Annotated[
        float,
        typer.Option(metavar="HOURS", min=0.01, help="Delete a session that nobody came back to."),
    ] = 24.0,
    idle: Annotated[float, _seconds("End a conversation that sends no sound for so long.")] = 60.0,
    hf_repo: Annotated[
        str, typer.Option(help="As for moshi.server.")
    ] = "kyutai/moshiko-pytorch-bf16",
    moshi_weight: FilePath = None,
    mimi_weight: FilePath = None,
    tokenizer: FilePath = None,
    lora_weight: FilePath = None,
    config_path: FilePath = None,
    cfg_coef: Annotated[float, typer.Option(help="As for moshi.server.")] = 1.0,
    device: Annotated[str, typer.Option(help="As for moshi.server.")] = "cuda",
    half: Annotated[bool, typer.Option("--half", help="float16, not bfloat16.")] = False,
    adapter: Adapter = None,
    layers: Layers = None,
    preset: Preset = None,
    recent: Recent = None,
    virtual: Virtual = None,
    chunk: Chunk = None,
    sinks: Sinks = None,
    memory: Memory = None,
) -> None:
    """Serve many conversations at once, each a row of one batch, to Moshi's clients and browsers.

    They connect as to moshi.server, come and go as they like, and each gets what
    it would get alone. With --sessions a conversation survives its connection
    and the server: docs/serving.md. SIGINT or SIGTERM saves all and ends.

    Example: ttt-cache serve --rows 64 --ttt-cache out/my-adapter --sessions out/sessions

    Then: python -m moshi.client, or open http://localhost:8998 in a browser
    """
    if find_spec("prometheus_client") is None:
        raise fail("serving needs prometheus_client: pip install 'ttt-cache[serve]'")
    install = installer(
        adapter,
        layers=layers,
        preset=preset,
        recent=recent,
        virtual=virtual,
        chunk=chunk,
        sinks=sinks,
        memory=memory,
    )
    import torch

    from ttt_cache.launch import Refused
    from ttt_cache.serving.load import Files
    from ttt_cache.serving.run import Options, prepare
    from ttt_cache.serving.talk import Limits

    files = Files(
        hf_repo,
        moshi_weight,
        mimi_weight,
        tokenizer,
        lora_weight,
        config_path,
        cfg_coef,
        device,
        torch.float16 if half else torch.bfloat16,
    )
    options = Options(rows, host, port, token, ssl, sessions, save_every, keep * 3600, Limits(idle))
    try:
        with refusals("", OSError):
            server = prepare(options, files, install)
    except Refused as refused:
        raise fail(reason(refused)) from None
    server.run()
