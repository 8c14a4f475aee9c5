"""`ttt-cache report --presets`: every named system in one table."""

from __future__ import annotations

from dataclasses import fields
from itertools import groupby

import typer

from ttt_cache.config import CacheConfig
from ttt_cache.presets import DOCS, PRESETS, Preset


def list_presets(wanted: bool) -> None:
    """Print the presets and leave, whatever else is asked for, as `--version` does."""
    if not wanted:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Presets: ttt_cache.patch(model, preset=...), --preset", expand=True)
    table.add_column("preset", no_wrap=True)
    table.add_column("what it is", ratio=3)
    table.add_column("settings", ratio=2)
    for section, named in groupby(PRESETS.items(), lambda item: item[1].section):
        table.add_row(section, page(section), style="bold")
        for name, preset in named:
            table.add_row(name, preset.about, compact(preset))
        table.add_section()
    Console().print(table)
    raise typer.Exit


def page(section: str) -> str:
    """Where a section of the presets' page is, as GitHub names headings."""
    return f"{DOCS}#{section.lower().replace(' ', '-')}"


def compact(preset: Preset) -> str:
    """The settings that differ from the defaults, such as `memory=none sinks=4`."""
    defaults = {field.name: field.default for field in fields(CacheConfig)}
    own = {name: value for name, value in preset.settings.items() if value != defaults[name]}
    return " ".join(f"{name}={value}" for name, value in own.items()) or "the defaults"
