"""What the network sees: Moshi's websocket, health and metrics.

A page for browsers is another route here.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
from dataclasses import dataclass

from aiohttp import WSCloseCode, WSMsgType, web

from .conversation import AUDIO, Conversation
from .errors import RefusedError
from .host import Host
from .opus import MalformedError

HANDSHAKE, METADATA = b"\x00", b"\x04"
NEW = "new"  # ?session=new: begin one, and say its name
SESSION_HEADER = "X-Session-Id"
MOST_BYTES = 64 * 1024  # in a message; a frame of Opus is 300 bytes
ENDED = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)
MOST_PASSED = 1000  # messages of other kinds from one client
CLOSE_S = 3.0  # for a client to answer that it has been closed


@dataclass
class Limits:
    """How long a client may keep others waiting, in seconds.

    Args:
        idle: without sound.
        write: without reading what it is sent.
    """

    idle: float = 60.0
    write: float = 10.0


class Web:
    """The routes.

    Args:
        token: that a client must show; `None`: none.
    """

    def __init__(self, host: Host, limits: Limits, token: str | None = None) -> None:
        self._host, self._limits, self._token = host, limits, token

    def application(self) -> web.Application:
        app = web.Application(client_max_size=0)
        app.router.add_get("/api/chat", self.chat)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        return app

    async def health(self, request: web.Request) -> web.Response:
        """For load balancers, without a token: 200, or 503 once no one is taken in any more."""
        stopping = self._host.stopping
        state = {"status": "stopping" if stopping else "ok"}
        state |= {"conversations": self._host.conversations}
        return web.json_response(state, status=503 if stopping else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        self._check_token(request)
        return web.Response(body=self._host.metrics.text(), headers={
            "Content-Type": "text/plain; version=0.0.4; charset=utf-8"})  # fmt: skip

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """One conversation, from its row to its last message."""
        self._check_token(request)
        asked = request.query.get("session")
        ws = web.WebSocketResponse(max_msg_size=MOST_BYTES, compress=False, timeout=2)
        if not ws.can_prepare(request):
            raise web.HTTPUpgradeRequired
        try:
            conversation = await self._host.admit(None if asked == NEW else asked)
        except RefusedError as refused:
            raise self._refusal(refused.status, refused.word, str(refused)) from None
        code = WSCloseCode.ABNORMAL_CLOSURE
        try:
            ws.headers[SESSION_HEADER] = conversation.name
            await ws.prepare(request)
            code = await self._talk(ws, conversation, asked is not None, request.transport)
        except ConnectionError:
            pass  # it went before it was connected
        finally:
            # Not to be cancelled with the connection: the row must be freed, and saved.
            await asyncio.shield(self._host.leave(conversation, code))
        return ws

    async def _talk(
        self,
        ws: web.WebSocketResponse,
        talk: Conversation,
        told: bool,
        transport: asyncio.Transport | None,
    ) -> int:
        """Hear and speak until either ends; returns the close code."""
        speaking = asyncio.ensure_future(self._speak(ws, talk, told))
        hearing = asyncio.ensure_future(self._hear(ws, talk))
        tasks = [speaking, hearing, talk.ending]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            code, reason = done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(CLOSE_S):
                await ws.close(code=code, message=reason.encode())
        except (TimeoutError, ConnectionError):
            if transport is not None:
                transport.abort()  # whoever does not read would keep the socket open
        return code

    async def _speak(
        self, ws: web.WebSocketResponse, talk: Conversation, told: bool
    ) -> tuple[int, str]:
        """Send answers until the client does not take them."""
        messages = [HANDSHAKE]
        if told:
            messages.append(METADATA + json.dumps({"session": talk.name}).encode())
        try:
            while True:
                for message in messages:
                    async with asyncio.timeout(self._limits.write):
                        await ws.send_bytes(message)
                messages = await talk.messages()
        except TimeoutError:
            return WSCloseCode.POLICY_VIOLATION, "the client does not read what it is sent"
        except ConnectionError:
            return WSCloseCode.ABNORMAL_CLOSURE, "the connection is gone"

    async def _hear(self, ws: web.WebSocketResponse, talk: Conversation) -> tuple[int, str]:
        """Take in messages until there are no more; returns a close code and why."""
        loop = asyncio.get_running_loop()
        deadline, passed = loop.time() + self._limits.idle, 0
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await ws.receive()
            except TimeoutError:
                return WSCloseCode.POLICY_VIOLATION, "no sound came for too long"
            if message.type in ENDED:  # by the client, or by aiohttp: the protocol was broken
                return ws.close_code or WSCloseCode.ABNORMAL_CLOSURE, ""
            # As in Moshi's server, what is of another kind is passed over.
            if message.type is not WSMsgType.BINARY or message.data[:1] != AUDIO:
                passed += 1
                if passed > MOST_PASSED:
                    return WSCloseCode.POLICY_VIOLATION, "too many messages that are no sound"
                continue
            try:
                await talk.hear(message.data[1:])
            except MalformedError as error:
                return WSCloseCode.INVALID_TEXT, str(error)[:100]
            deadline = loop.time() + self._limits.idle

    def _check_token(self, request: web.Request) -> None:
        """Raise `HTTPUnauthorized` unless the request shows the token.

        As a bearer, as the password of `ws://any:TOKEN@host`, which is how `moshi.client --url` can
        give one, or as `?token=`, since browsers cannot set a header of a websocket.
        """
        if self._token is None:
            return
        kind, _, shown = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                shown = base64.b64decode(shown, validate=True).decode().partition(":")[2]
        elif kind.lower() != "bearer":
            shown = request.query.get("token", "")
        if not hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self._token.encode()):
            raise self._refusal(401, "token", "a token is needed")

    def _refusal(self, status: int, word: str, reason: str) -> web.HTTPException:
        self._host.metrics.refused(word)
        kinds = {401: web.HTTPUnauthorized, 404: web.HTTPNotFound, 409: web.HTTPConflict}
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if status == 503:
            headers["Retry-After"] = "10"
        return kinds.get(status, web.HTTPServiceUnavailable)(text=reason, headers=headers)
