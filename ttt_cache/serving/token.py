"""Whether a request shows the server's token."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
from collections.abc import Mapping


def check_token(token: str | None) -> None:
    """Raise `ValueError` unless it can be shown in a header; `None`: there is none."""
    if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
        raise ValueError("--token must be printable ASCII characters, and at least one")


def shown(authorization: str, query: Mapping[str, str]) -> str:
    """The token that a request shows, or nothing.

    As a bearer, as the password of `ws://any:TOKEN@host`, which is how `moshi.client --url` can
    give one, or as `?token=`, since browsers cannot set a header of a websocket.

    Args:
        authorization: the header of that name; empty if there is none.
    """
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value
    if kind.lower() == "basic":
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
    return query.get("token", "")


def matches(token: str | None, given: str) -> bool:
    """Whether it is the server's, in constant time; `None` takes any."""
    if token is None:
        return True
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())
