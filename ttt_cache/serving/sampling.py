"""What a checkpoint's config says of sampling, looked at before its weights are loaded."""

from __future__ import annotations

from inspect import signature
from typing import Any

from moshi.models.lm import LMGen

KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}
OPTION = "cfg_coef"  # which has a flag of its own, and is refused by Moshi in a config
ROWS = "cfg_is_masked_until"


def check_lm_gen_config(named: str, given: Any) -> dict[str, Any]:
    """The arguments of LMGen that a config gives as `lm_gen_config`.

    Args:
        named: how the user names the config, for what is said of it.
        given: what it holds.

    Raises:
        ValueError: it is no object, has a key that is unknown, or a value of the wrong kind.
    """
    what = f"{named}: lm_gen_config"
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be an object, got {given!r}")
    takes = {name: each.annotation for name, each in signature(LMGen).parameters.items()}
    kinds = {name: kind for name, kind in takes.items() if kind in KINDS and name != OPTION}
    for key, value in given.items():
        if key == ROWS:
            if value is not None and not (isinstance(value, list) and all(map(_whole, value))):
                raise ValueError(f"{what}.{key} must be a list of whole numbers, got {value!r}")
        elif key not in kinds:
            allowed = ", ".join(sorted((*kinds, ROWS)))
            raise ValueError(f"{what} must hold only {allowed}, got {key!r}")
        elif not _is(kinds[key], value):
            raise ValueError(f"{what}.{key} must be {KINDS[kinds[key]]}, got {value!r}")
    return dict(given)


def _is(kind: type, value: Any) -> bool:
    return _whole(value) or isinstance(value, float) if kind is float else type(value) is kind


def _whole(value: Any) -> bool:
    return type(value) is int
