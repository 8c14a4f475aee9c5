"""A whole server but for its network and its model, and clients that do anything to it.

Time is made up, so a run of it is the same each time. What must be true is asserted in `check`,
which is to be called between any two things that happen, and in `settle` and `end`.
"""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
from launch_files import FRAME
from serving_fakes import FOREIGN, UNKNOWN, Disk, FakePeer, Neighbours, Rows
from serving_guest import Guest, piece
from serving_time import Turns, Worker

from ttt_cache.serving import conversation, saving
from ttt_cache.serving.clock import Clock
from ttt_cache.serving.conversation import INBOX, OUTBOX, Conversation
from ttt_cache.serving.errors import RefusedError
from ttt_cache.serving.host import Host
from ttt_cache.serving.metrics import Metrics
from ttt_cache.serving.talk import Limits, converse

ROWS = 3
LIMITS = Limits(idle=6.0, write=3.0)
SETTLED_S = 5.0  # all that was said is answered, and who does not read is gone
ALONE_S = 20.0  # whoever neither talks nor reads is gone


class World:
    """The server and its guests. Numbers that name a guest or a session wrap around."""

    def __init__(self) -> None:
        self.loop, self.number, self.halted = Turns(), 0, False
        self.guests: list[Guest] = []
        asyncio.set_event_loop(self.loop)
        clock = SimpleNamespace(monotonic=self.loop.time)
        self._patches = [patch.object(each, "time", clock) for each in (conversation, saving)]
        for each in self._patches:
            each.start()
        self.names: list[str] = []
        self.engine, self.disk = Rows(ROWS), Disk()
        self.model, self.store = Worker(self.loop, 0.02), Worker(self.loop, 0.01)
        self.loop.run_until_complete(self._begin())

    async def _begin(self) -> None:
        metrics = Metrics(ROWS, 0)
        self.clock = Clock(self.engine, metrics, self.model)  # type: ignore[arg-type]
        others = Neighbours(self.engine, self.disk)
        self.host = Host(self.engine, self.clock, metrics, piece, self.disk, 2.0, others)  # type: ignore[arg-type]
        self.host._saving._disk = self.store  # type: ignore[assignment, union-attr]
        self.stepping = asyncio.ensure_future(self._step())
        self.saving = asyncio.ensure_future(self.host.save())

    async def _step(self) -> None:
        """As `ttt_cache.serving.run` does."""
        try:
            await self.clock.run()
        except RuntimeError:
            await self.host.abandon()

    # What happens.

    def connect(self, kind: str, codec: str, session: int = 0, after: float = 0.0) -> None:
        """A client comes; `after` so many seconds it is connected."""
        known = self.names[session % len(self.names)] if self.names else "new"
        names = {"none": None, "known": known, "foreign": FOREIGN, "unknown": UNKNOWN}
        asked = names.get(kind, kind)
        guest = Guest(asked, codec)
        guest.connected_after = after
        self.guests.append(guest)
        guest.task = self.loop.create_task(self._converse(guest))

    async def _converse(self, guest: Guest) -> None:
        async def connected(conversation: Conversation) -> FakePeer:
            assert conversation.name not in self.engine.names.values(), "one at a time"
            self.engine.names[conversation.row] = conversation.name
            guest.base = list(self.engine.heard[conversation.row])
            kept = self.engine.left if takes_over or unwritten else self.disk.kept
            assert guest.base == (kept.get(conversation.name) or []), "all of it, disk or no disk"
            self.names.append(conversation.name)
            guest.conversation = conversation
            await asyncio.sleep(guest.connected_after)
            if guest.peer.gone:
                raise ConnectionResetError
            return guest.peer

        takes_over = guest.asked in self.host._seats.here
        unwritten = guest.asked in self.host._saving._unwritten  # type: ignore[union-attr]
        try:
            await converse(self.host, LIMITS, guest.asked, guest.codec, connected)
        except RefusedError as refused:
            assert guest.conversation is None
            assert not (takes_over and refused.status == 404), "what is there is not unknown"
            guest.refused = refused.status

    def say(self, guest: Guest, frames: int, cut: int = 0) -> None:
        """Whole frames in one message, or in two, cut somewhere."""
        if guest.codec == "opus":
            silence = np.zeros(FRAME, np.float32)
            sound = b"".join(guest.writer.append_pcm(silence) for _ in range(frames))
        else:
            sound = b""
            for _ in range(frames):
                self.number += 1
                sound += np.array([self.number, *[0] * (FRAME - 1)], "<i2").tobytes()
        cut = cut // 2 * 2
        for part in (sound[:cut], sound[cut:]):
            self.send(guest, b"\x01" + part)

    def send(self, guest: Guest, message: bytes) -> None:
        """Anything. Half a sample ends the conversation."""
        if message[:1] == b"\x01" and len(guest.stream) % 2 == 0:
            guest.stream += message[1:]
        guest.peer.put(message)

    def stop(self) -> None:
        self.stopping = self.loop.create_task(self._stop())

    async def _stop(self) -> None:
        """As `ttt_cache.serving.run` does."""
        self.halted = True
        self.clock.halt()
        await asyncio.wait([self.stepping])
        await self.host.stop()

    @property
    def here(self) -> list[Guest]:
        """Those who have not ended."""
        return [guest for guest in self.guests if not guest.task.done()]

    # What must be true.

    def check(self) -> None:
        """At any time."""
        assert not self.loop.complaints, self.loop.complaints
        seats, saving = self.host._seats, self.host._saving
        assert len(seats.here) <= 2 * ROWS, "each may hold a session that waits for the disk"
        assert len(saving._unwritten) <= ROWS and self.host.conversations <= ROWS  # type: ignore[union-attr]
        assert not self.saving.done() and (
            self.halted or self.engine.fails or not self.stepping.done()
        )
        for guest in self.guests:
            if guest.task.done() and not guest.task.cancelled():
                assert guest.task.exception() is None or self.engine.fails
            if guest.conversation is not None:
                assert len(guest.conversation._inbox) <= INBOX
                assert guest.conversation._outbox.qsize() <= OUTBOX

    def settle(self) -> None:
        """Some seconds later, with a quick model and disk."""
        self.model.seconds, self.store.seconds = 0.02, 0.01
        self.loop.pass_time(SETTLED_S)
        if not all(map(self.clock.steps, self.host._seats.here.values())):
            self.loop.pass_time(0.1)  # for who leaves at this very moment
        self.check()
        for guest in self.guests:
            guest.check()
        assert len(self.engine.heard) == len(self.here), "each has a row, and nobody else"
        assert self.host._seats.left == self.engine.free
        assert self.disk.full or not self.host._saving._unwritten, "tried again"  # type: ignore[union-attr]
        for guest in self.here:
            assert guest.conversation is not None, "nobody is kept waiting"
            if not self.disk.full and not self.engine.fails:
                assert guest.conversation.name not in self.disk.behind, "tried again"
            if guest.peer.reads.is_set() and guest.codec == "pcm" and not self.engine.fails:
                got = [each for each in guest.peer.got if each[:1] in (b"\x01", b"\x02")]
                assert len(got) == len(guest.answers()), "all is answered"

    def fall_silent(self) -> None:
        """Nobody says anything any more."""
        self.settle()
        self.loop.pass_time(ALONE_S)
        self.check()
        assert not self.here

    def end(self) -> None:
        """Stop the server: nothing is left behind, and everything is saved."""
        try:
            self.model.seconds, self.store.seconds = 0.02, 0.01
            self.stop()
            self.loop.pass_time(SETTLED_S)
            assert self.stopping.done() and all(guest.task.done() for guest in self.guests)
            assert self.engine.free == self.host._seats.left == ROWS
            assert (
                not self.host._seats.here and not self.host._seats.coming and not self.host._leaving
            )
            for name, heard in self.engine.left.items():
                if heard and name not in self.disk.behind and not self.engine.fails:
                    assert self.disk.kept.get(name) == heard, "saved to its last frame"
            for guest in self.guests:
                guest.check()
        finally:
            self._close()

    def _close(self) -> None:
        own = [self.stepping, self.saving]
        for task in own:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*own, return_exceptions=True))
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        for guest in self.guests:
            if guest.task.done() and not guest.task.cancelled():
                guest.task.exception()
        gc.collect(0)
        for each in self._patches:
            each.stop()
        asyncio.set_event_loop(None)
        self.loop.close()
        assert not left, f"tasks that nobody ends: {left}"
        assert not self.loop.complaints, self.loop.complaints
