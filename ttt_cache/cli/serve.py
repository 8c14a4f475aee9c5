"""`ttt-cache serve`: many conversations with one Moshi, for Moshi's own clients."""

from __future__ import annotations

from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import fail, reason, refusals
from .launch import Adapter, Layers, installer
from .options import Chunk, Memory, Preset, Recent, Sinks, Virtual, number

if TYPE_CHECKING:
    from ttt_cache.serving.load import Files
    from ttt_cache.serving.run import Options, Work

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
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="One replica of the model on each GPU of a Ray cluster: that of RAY_ADDRESS, the "
            "one of this machine, or else one that is begun and ended with the command.",
        ),
    ] = False,
    replicas: Annotated[
        int | None, number("With --ray: copies of the model, at least 1.", "the cluster's GPUs")
    ] = None,
) -> None:
    """Serve many conversations at once, each a row of one batch, to Moshi's clients and browsers.

    They connect as to moshi.server, come and go as they like, and each gets what
    it would get alone. With --sessions a conversation survives its connection
    and the server: docs/serving.md. SIGINT or SIGTERM saves all and ends.

    Example: ttt-cache serve --rows 64 --ttt-cache out/my-adapter --sessions out/sessions

    Several GPUs: ttt-cache serve --ray --rows 64 --sessions /shared/sessions (docs/cluster.md)

    Then: python -m moshi.client, or open http://localhost:8998 in a browser
    """
    given = locals()
    if find_spec("prometheus_client") is None:
        raise fail("serving needs prometheus_client: pip install 'ttt-cache[serve]'")
    if ray and find_spec("ray") is None:
        raise fail("--ray needs Ray: pip install 'ttt-cache[ray]'")
    if replicas is not None and not ray:
        raise fail("--replicas is for --ray; without it there is one")
    work = asked(**given)
    from ttt_cache.launch import Refused
    from ttt_cache.serving.logs import log_lines
    from ttt_cache.serving.run import prepare

    log_lines()
    try:
        with refusals("", OSError):
            if ray:
                from ttt_cache.serving.cluster.run import prepare as prepare_cluster

                server = prepare_cluster(work, replicas)
            else:
                server = prepare(work)
    except Refused as refused:
        raise fail(reason(refused)) from None
    server.run()


def asked(**given: Any) -> Work:
    """What the options of `serve` ask for, by their names; those not given have their defaults.

    Raises:
        ValueError: there is no such option.
    """
    known = {name: each.default for name, each in signature(serve).parameters.items()}
    if unknown := given.keys() - known:
        raise ValueError(f"ttt-cache serve has no option {', '.join(sorted(unknown))}")
    each = SimpleNamespace(**known | given)
    settings = ("layers", "preset", "recent", "virtual", "chunk", "sinks", "memory")
    from ttt_cache.serving.load import absolute
    from ttt_cache.serving.run import Work

    # Absolute where it is a folder here: a replica has another working directory.
    adapter = absolute(each.adapter) if each.ray else each.adapter
    install = installer(adapter, **{name: getattr(each, name) for name in settings})
    files = _files(each)
    return Work(_options(each), files, install)


def _files(each: SimpleNamespace) -> Files:
    import torch

    from ttt_cache.serving.load import Files

    return Files(
        each.hf_repo,
        each.moshi_weight,
        each.mimi_weight,
        each.tokenizer,
        each.lora_weight,
        each.config_path,
        each.cfg_coef,
        each.device,
        torch.float16 if each.half else torch.bfloat16,
    )


def _options(each: SimpleNamespace) -> Options:
    from ttt_cache.serving.run import Options
    from ttt_cache.serving.talk import Limits

    return Options(
        each.rows,
        each.host,
        each.port,
        each.token,
        each.ssl and Path(each.ssl),
        each.sessions and Path(each.sessions),
        each.save_every,
        each.keep * 3600,
        Limits(each.idle),
    )
