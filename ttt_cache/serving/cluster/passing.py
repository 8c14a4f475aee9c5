"""A connection from one process of a machine to another, through a Unix socket."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

COMES_S = 1.0  # for what was announced: it comes at once, or the other process was killed


def listening(path: Path, waiting: int) -> socket.socket:
    """A socket at which connections are received.

    Args:
        waiting: how many may wait to be received.
    """
    made = _unix()
    made.bind(str(path))
    made.listen(waiting)
    return made


def listens(path: Path) -> bool:
    """Whether a process is there that has made a socket `listening`; visits it if so."""
    with _unix() as other:
        try:
            other.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # many wait to be received
            pass
    return True


def send(path: Path, connection: socket.socket, number: int) -> bool:
    """Send a connection, and close it here; does not wait.

    Args:
        number: 0 to 255, for the other side.

    Returns:
        whether it was sent; else it is as it was: the other process is dead, or too many wait.
    """
    with _unix() as other:
        try:
            other.connect(str(path))
            socket.send_fds(other, [bytes([number])], [connection.fileno()])
        except OSError:
            return False
    connection.close()
    return True


async def receive(listener: socket.socket) -> tuple[socket.socket, int]:
    """Wait for a connection that is sent, and its number.

    Raises:
        OSError: this process has no more sockets.
    """
    while True:
        sender, _ = await asyncio.get_running_loop().sock_accept(listener)
        with sender:
            try:
                async with asyncio.timeout(COMES_S):
                    await _readable(sender)
                message, descriptors, _, _ = socket.recv_fds(sender, 1, 1)
            except OSError:  # it was killed before it had sent anything
                continue
        if descriptors:  # none from who only looks whether somebody listens
            os.set_inheritable(descriptors[0], False)
            connection = socket.socket(fileno=descriptors[0])
            connection.setblocking(False)
            return connection, message[0]


def _unix() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


async def _readable(connection: socket.socket) -> None:
    """Wait for a message: `asyncio` cannot receive one with a socket in it."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(connection)
