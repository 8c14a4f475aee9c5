"""What the network sees: Moshi's websocket, the page for browsers, health and metrics."""

from __future__ import annotations

import asyncio

from aiohttp import WSMsgType, web

from .conversation import Conversation
from .errors import ABNORMAL, RefusedError
from .gauge import message_taken
from .host import Host
from .page import add_page
from .talk import MOST_BYTES, Limits, converse
from .token import matches, shown

SESSION_HEADER = "X-Session-Id"
ENDED = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)


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
        add_page(app.router)
        return app

    async def health(self, request: web.Request) -> web.Response:
        """For load balancers, without a token: 200, or 503 once no one is taken in any more.

        For the page, too, since a browser is not told why its websocket was refused.
        """
        stopping = self._host.stopping
        state = {
            "status": "stopping" if stopping else "ok",
            "conversations": self._host.conversations,
            "rows": self._host.rows,
            "sessions": self._host.keeps_sessions,
            "token": self._token is not None,
        }
        return web.json_response(state, status=503 if stopping else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        self._check_token(request)
        return web.Response(body=self._host.metrics.text(), headers={
            "Content-Type": "text/plain; version=0.0.4; charset=utf-8"})  # fmt: skip

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """One conversation, from its row to its last message."""
        self._check_token(request)
        self._check_origin(request)
        asked, codec = request.query.get("session"), request.query.get("codec", "opus")
        # Pings count as messages: whoever sends nothing else must not keep the server busy.
        ws = web.WebSocketResponse(
            max_msg_size=MOST_BYTES, compress=False, timeout=2, autoping=False
        )
        if not ws.can_prepare(request):
            raise web.HTTPUpgradeRequired

        async def connect(conversation: Conversation) -> Websocket:
            if request.transport is None:
                raise ConnectionResetError
            ws.headers[SESSION_HEADER] = conversation.name
            await ws.prepare(request)
            request.transport.resume_reading()  # which the door has paused
            return Websocket(ws, request.transport)

        try:
            await converse(self._host, self._limits, asked, codec, connect)
        except RefusedError as refused:
            raise self._refusal(refused.status, refused.word, str(refused)) from None
        return ws

    def _check_token(self, request: web.Request) -> None:
        """Raise `HTTPUnauthorized` unless the request shows the token."""
        authorization = request.headers.get("Authorization", "")
        if not matches(self._token, shown(authorization, request.query)):
            raise self._refusal(401, "token", "a token is needed")

    def _check_origin(self, request: web.Request) -> None:
        """Raise `HTTPForbidden` for pages of others: a browser lets them connect to localhost, too.

        With a token they may: they do not know it unless they were told. Programs have no origin.
        """
        origin = request.headers.get("Origin")
        if self._token is None and origin and origin.partition("://")[2] != request.host:
            raise self._refusal(403, "origin", "pages of other addresses are let in with a token")

    def _refusal(self, status: int, word: str, reason: str) -> web.HTTPException:
        self._host.metrics.refused(word)
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if status == 503:
            headers["Retry-After"] = "10"
        return REFUSALS[status](text=reason, headers=headers)


REFUSALS: dict[int, type[web.HTTPException]] = {
    400: web.HTTPBadRequest,
    401: web.HTTPUnauthorized,
    403: web.HTTPForbidden,
    404: web.HTTPNotFound,
    409: web.HTTPConflict,
    503: web.HTTPServiceUnavailable,
}


class Websocket:
    """aiohttp's websocket as the `Peer` of a talk."""

    def __init__(self, ws: web.WebSocketResponse, transport: asyncio.Transport) -> None:
        self._ws, self._transport = ws, transport

    async def receive(self) -> bytes | int:
        message = await self._ws.receive()
        message_taken(self._transport)
        if message.type in ENDED:  # by the client, or by aiohttp: the protocol was broken
            return self._ws.close_code or ABNORMAL
        if message.type is WSMsgType.PING:
            await self._ws.pong(message.data)
        return message.data if message.type is WSMsgType.BINARY else b""

    async def send(self, message: bytes) -> None:
        await self._ws.send_bytes(message)

    async def close(self, code: int, reason: str) -> None:
        await self._ws.close(code=code, message=reason.encode())

    def abort(self) -> None:
        self._transport.abort()
