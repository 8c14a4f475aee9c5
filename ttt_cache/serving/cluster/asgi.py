"""What a replica answers: the routes of `web.py` for a server that speaks ASGI, as Ray's does.

A page for browsers is another route here, as there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..errors import ABNORMAL, NO_TOKEN, TOO_BIG, VIOLATION, RefusedError
from ..host import Host
from ..talk import MOST_BYTES, NEW, Limits, Talk
from ..token import matches, shown
from ..web import SESSION_HEADER

# Bytes that a client may be ahead of the model. ASGI's receive cannot be slowed down through Ray:
# what is not taken in would pile up in the replica. Of Opus these are minutes, of samples 20 s.
MOST_AHEAD = 1024 * 1024
PER_MESSAGE = 100  # of those bytes, for one that is empty takes memory, too


class Asgi:
    """The routes.

    Args:
        token: that a client must show; `None`: none.
    """

    def __init__(self, host: Host, limits: Limits, token: str | None = None) -> None:
        self._host, self._limits, self._token = host, limits, token
        self._talking: set[asyncio.Future[None]] = set()  # asyncio holds no task by itself

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                WebSocketRoute("/api/chat", self.chat),
                Route("/api/chat", self.no_upgrade),
                Route("/health", self.health),
            ]
        )

    async def health(self, request: Request) -> Response:
        """For load balancers, without a token: 200, or 503 once no one is taken in any more."""
        status, state = self._host.health
        return JSONResponse(state, status)

    async def no_upgrade(self, request: Request) -> Response:
        return PlainTextResponse("a websocket is needed", 426, headers={"Upgrade": "websocket"})

    async def chat(self, ws: WebSocket) -> None:
        """One conversation, from its row to its last message."""
        peer = Websocket(ws)
        # Not to be cancelled with the request: the row must be freed, and saved.
        talking = asyncio.ensure_future(self._chat(ws, peer))
        self._talking.add(talking)
        talking.add_done_callback(self._talking.discard)
        try:
            await asyncio.shield(talking)
        except asyncio.CancelledError:
            peer.lost()
            raise

    async def _chat(self, ws: WebSocket, peer: Websocket) -> None:
        asked, codec = ws.query_params.get("session"), ws.query_params.get("codec", "opus")
        try:
            authorization = ws.headers.get("Authorization", "")
            if not matches(self._token, shown(authorization, ws.query_params)):
                raise RefusedError(401, "token", NO_TOKEN)
            conversation = await self._host.admit(None if asked == NEW else asked, codec)
        except RefusedError as refused:
            self._host.metrics.refused(refused.word)
            denial = PlainTextResponse(str(refused), refused.status, headers=refused.headers)
            with contextlib.suppress(ConnectionError), _connection():
                await ws.send_denial_response(denial)
            return
        code = ABNORMAL
        try:
            await peer.accept([(SESSION_HEADER.encode(), conversation.name.encode())])
            talk = Talk(self._host, self._limits, conversation, asked)
            code = await talk.run(peer)
        except ConnectionError:
            pass  # it went before it was connected
        finally:
            peer.done()
            await self._host.leave(conversation, code)


class Websocket:
    """Starlette's websocket as the `Peer` of a talk."""

    def __init__(self, ws: WebSocket) -> None:
        self._ws = ws
        self._came: deque[bytes] = deque()
        self._ahead, self._code = 0, 0  # bytes not taken yet; the close code once there is one
        self._gone = False
        self._news = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    async def accept(self, headers: list[tuple[bytes, bytes]]) -> None:
        with _connection():
            await self._ws.accept(headers=headers)
        self._reading = asyncio.ensure_future(self._read())

    async def receive(self) -> bytes | int:
        while not self._came and not self._code:
            self._news.clear()
            await self._news.wait()
        if not self._came:
            return self._code
        message = self._came.popleft()
        self._ahead -= len(message) + PER_MESSAGE
        return message

    async def send(self, message: bytes) -> None:
        if self._gone:  # Ray would swallow it
            raise ConnectionError("the connection is gone")
        with _connection():
            await self._ws.send_bytes(message)

    async def close(self, code: int, reason: str) -> None:
        if not self._gone:
            with _connection():
                await self._ws.close(code, reason)

    def abort(self) -> None:
        """The server drops the connection when the request is done."""

    def lost(self) -> None:
        """The connection is gone, and ASGI does not say so any more."""
        self._gone = True
        self._end(ABNORMAL)

    def done(self) -> None:
        """Nobody receives any more."""
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        """Take in what comes, at once, so that it is counted here and not heaped up elsewhere."""
        while not self._code:
            try:
                message = await self._ws.receive()
            except Exception:  # whatever a server raises that has lost the connection
                return self.lost()
            if message["type"] == "websocket.disconnect":
                self._gone = True
                return self._end(message.get("code") or ABNORMAL)
            self._take(message)

    def _take(self, message: Any) -> None:
        text, payload = message.get("text"), message.get("bytes") or b""
        if max(len(text or ""), len(payload)) > MOST_BYTES:
            return self._refuse(TOO_BIG)
        self._ahead += len(payload) + PER_MESSAGE
        if self._ahead > MOST_AHEAD:
            return self._refuse(VIOLATION)
        self._came.append(payload)
        self._news.set()

    def _refuse(self, code: int) -> None:
        self._came.clear()
        self._end(code)

    def _end(self, code: int) -> None:
        self._code = self._code or code
        self._news.set()


@contextlib.contextmanager
def _connection() -> Any:
    """Starlette raises what its server does, and `RuntimeError` where the client has gone."""
    try:
        yield
    except (RuntimeError, OSError, WebSocketDisconnect) as error:
        raise ConnectionError(str(error)) from None
