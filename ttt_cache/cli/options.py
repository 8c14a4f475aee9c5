"""Options that several commands share, and how their text is read.

A setting that is not given stays `None` and takes the library's default; what `--help` shows as the
default is text, and a test keeps both equal.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer


def whole(text: str) -> int:
    """Read a whole number; typer's own message would not show what was given."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be a whole number, got {text!r}") from None


def number(help_text: str, default: str | bool = True) -> Any:
    """An option that takes a whole number; `default` is what `--help` shows."""
    return typer.Option(parser=whole, metavar="INT", help=help_text, show_default=default)


def numbers(help_text: str, default: str) -> Any:
    """An option that takes a whole number each time that it is given."""
    return number(f"{help_text}; give it again for more.", default)


def choice(help_text: str, default: str) -> Any:
    """An option that takes a name, judged by the library; `default` is what `--help` shows."""
    return typer.Option(metavar="NAME", help=help_text, show_default=default)


Preset = Annotated[
    str | None,
    choice(
        "A whole system under a name, listed by 'ttt-cache report --presets'. What else you give "
        "replaces single settings of it; the defaults below hold for what it leaves open.",
        "memory-bank",
    ),
]
Recent = Annotated[
    int | None,
    number(
        "Frames that are kept exactly (80 ms each), at least 1; 0 only for a TTT layer, which "
        "replaces attention (--preset ttt-mlp-layer).",
        "100",
    ),
]
Virtual = Annotated[
    int | None,
    number("Virtual tokens that are read out of the memory, at least 1.", "10"),
]
Chunk = Annotated[
    int | None,
    number("Frames that make one version of the memory together, at least 1.", "8"),
]
Sinks = Annotated[
    int | None,
    number("First frames that are kept for ever, 0 or more.", "0"),
]
Memory = Annotated[
    str | None,
    choice(
        "What takes in the older frames: the networks ttt-mlp and ttt-linear learn them; cluster "
        "groups them and needs no training; mean, random and none are controls to compare with.",
        "ttt-mlp",
    ),
]
Depth = Annotated[
    int | None,
    number("Layers of the network of ttt-mlp, 2 or 3.", "2"),
]
Source = Annotated[
    str | None,
    choice(
        "What a network learns of a frame: hidden (the layer's input), kv (its keys and values) "
        "or output (what attention to the window gave).",
        "hidden",
    ),
]
Read = Annotated[
    str | None,
    choice(
        "How the memory is read: virtual (attend to virtual tokens beside the window) or query "
        "(put each frame's own query through the network: a TTT layer).",
        "virtual",
    ),
]
Write = Annotated[
    str | None,
    choice(
        "When the memory takes in a frame: once it is evicted from the window, or as soon as it "
        "has arrived.",
        "evicted",
    ),
]

MOST_LAYERS = 1000  # a span beyond that is a typing error, not a list to be built
_SPAN = re.compile(r"(\d+)-(\d+)|(-?\d+)")


def parse_layers(text: str) -> tuple[int, ...] | None:
    """Read `--layers`: `all`, or layers and spans with commas between, such as `0,3,25-31`.

    Returns:
        The layers as given (-1 is the last one); `None` means all.

    Raises:
        ValueError: it is neither.
    """
    if text.strip() == "all":
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                "--layers must be 'all', layers or spans of layers from 0, such as 25-31 or 0,3,5 "
                f"(-1 is the last one), got {text!r}"
            )
        first, last, single = match.groups()
        if single is not None:
            layers.append(int(single))
        elif not 0 <= int(last) - int(first) < MOST_LAYERS:
            raise ValueError(
                f"--layers must name spans upwards and of at most {MOST_LAYERS} layers, "
                f"as in 25-31, got {part.strip()!r}"
            )
        else:
            layers.extend(range(int(first), int(last) + 1))
    return tuple(layers)


def given(**settings: Any) -> dict[str, Any]:
    """The settings that the user gave."""
    return {name: value for name, value in settings.items() if value is not None}
