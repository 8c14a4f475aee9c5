"""`ttt-cache serve --ray` as an application for `serve deploy`, which names `app_builder`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer
from ray.serve import Application

from ttt_cache.serving.cluster.app import application

from .serve import asked, serve


def app_builder(args: Mapping[str, Any]) -> Application:
    """The application that a file of Serve's asks for.

    Args:
        args: options of `ttt-cache serve` by their names, without the dashes; `true` for one that
            has no value. They are read, and refused, as those of the command.

    Raises:
        ValueError: an option is unknown, or its value is not allowed.
    """
    command = typer.Typer(add_completion=False)
    command.command()(serve)
    words = [word for name, value in args.items() for word in _words(name, value)]
    try:
        given = typer.main.get_command(command).make_context("args", words).params
    except Exception as error:
        if (said := getattr(error, "format_message", None)) is None:
            raise  # what typer says has one, whether it brings click's classes or uses them
        raise ValueError(said()) from None
    replicas = given.pop("replicas") or 1
    return application(asked(**given | {"ray": True}), replicas)


def _words(name: str, value: Any) -> Iterator[str]:
    option = f"--{name.replace('_', '-')}"
    if value is False or value is None:
        return
    yield option if value is True else f"{option}={value}"
