"""What the user asks the load generator for, checked before anything connects."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarl import URL

from ttt_cache.checks import one_of, real_number, seed_of, whole_number
from ttt_cache.serving.codec import CODECS
from ttt_cache.serving.conversation import FRAME_S
from ttt_cache.serving.token import check_token

CHAT = "/api/chat"
SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
LOCAL = "ws://localhost:8998"


@dataclass(frozen=True)
class Plan:
    """A load that can be put on a server.

    Attributes:
        url: of the server, `ws` or `wss`, without `/api/chat` and without a password.
        token: that it wants to be shown; never written down.
        clients: conversations at once, one level for each; `None`: double them until they are not
            held, then halve the gap.
        seconds, warm_up: of a level, measured and before that.
        codec: of the sound, one of `CODECS`.
        seed: of the sound.
        out: folder of the results.
    """

    url: str
    token: str | None
    clients: tuple[int, ...] | None
    seconds: float
    warm_up: float
    codec: str
    seed: int
    out: Path

    @property
    def chat(self) -> str:
        """The address of a new conversation; Moshi's own clients name no codec, and mean Opus."""
        return self.url + CHAT + ("" if self.codec == "opus" else f"?codec={self.codec}")

    def page(self, path: str) -> str:
        """The address of something else that a server has."""
        return "http" + self.url.removeprefix("ws") + path

    @property
    def headers(self) -> dict[str, str]:
        """What a request shows."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    @property
    def warm_up_frames(self) -> int:
        return round(self.warm_up / FRAME_S)

    @property
    def frames(self) -> int:
        """That a client sends, warming up included."""
        return self.warm_up_frames + max(1, round(self.seconds / FRAME_S))

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able, without what is secret."""
        return {
            "url": self.url,
            "clients": "ramp" if self.clients is None else list(self.clients),
            "seconds": self.seconds,
            "warm_up": self.warm_up,
            "codec": self.codec,
            "seed": self.seed,
        }

    @property
    def command(self) -> str:
        """The command that makes this plan, but for the token."""
        words = ["ttt-cache", "bench", "serve", "--url", self.url, "--codec", self.codec]
        for number in self.clients or ():
            words += ["--clients", str(number)]
        words += ["--seconds", f"{self.seconds:g}", "--warm-up", f"{self.warm_up:g}"]
        return shlex.join([*words, "--seed", str(self.seed), "--out", str(self.out)])


def make_plan(
    url: str = LOCAL,
    token: str | None = None,
    clients: Sequence[int] | None = None,
    seconds: float = 20.0,
    warm_up: float = 10.0,
    codec: str = "opus",
    seed: int = 0,
    out: Path = Path("out/bench-serve"),
) -> Plan:
    """Check every choice; nothing is connected to and nothing written yet.

    Raises:
        TypeError, ValueError: a choice is not possible; the message names it.
    """
    base, password = _address(url)
    if token is not None and password is not None:
        raise ValueError("--token and a password in --url exclude each other")
    token = password if token is None else token
    check_token(token)
    levels = None
    if clients:
        levels = tuple(sorted({whole_number("--clients", number, 1) for number in clients}))
    return Plan(
        url=base,
        token=token,
        clients=levels,
        seconds=real_number("--seconds", seconds, 1.0),
        warm_up=real_number("--warm-up", warm_up),
        codec=one_of("--codec", codec, tuple(CODECS)),
        seed=seed_of("--seed", seed),
        out=out,
    )


def _address(url: str) -> tuple[str, str | None]:
    """A server's address without `/api/chat`, and the password that is in it.

    Raises:
        ValueError: it is none.
    """
    try:
        parsed = URL(url)
        if parsed.scheme not in SCHEMES or not parsed.host:
            raise ValueError
    except ValueError:
        raise ValueError(f"--url must be an address such as {LOCAL}, got {url!r}") from None
    path = parsed.path.rstrip("/").removesuffix(CHAT)
    plain = URL.build(scheme=SCHEMES[parsed.scheme], host=parsed.host, port=parsed.port, path=path)
    return str(plain).rstrip("/"), parsed.password
