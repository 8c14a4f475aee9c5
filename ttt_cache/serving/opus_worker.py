"""Codes Opus: in this process, or in one of its own for many conversations of a server.

`pool.py` runs this file by its path. Then it imports neither torch nor the package, so that it
starts in a tenth of a second and holds 35 MB. Requests come through standard input, a socket, and
are answered in their order. It ends when that socket does, and by no signal that a terminal or a
service manager sends to all of the server's processes: conversations are saved first.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct

import numpy as np
import sphn

# A coder's number, what it is to do, and how many bytes follow. An answer: whether it did.
REQUEST, ANSWER, RATE = struct.Struct("<IBI"), struct.Struct("<?I"), struct.Struct("<I")
OPEN, ENCODE, DECODE, CLOSE = range(4)
READY = b"\x01"  # sent once, when all is imported
BUFFER = 1 << 20


class Streams:
    """One conversation's two streams.

    Args:
        rate: samples a second.
    """

    def __init__(self, rate: int) -> None:
        self._reader, self._writer = sphn.OpusStreamReader(rate), sphn.OpusStreamWriter(rate)

    def encode(self, pcm: bytes) -> bytes:
        """The Ogg/Opus, possibly none, that float32 samples complete."""
        return self._writer.append_pcm(np.frombuffer(pcm, np.float32))

    def decode(self, opus: bytes) -> bytes:
        """The float32 samples that Ogg/Opus completes.

        Raises:
            ValueError: it is none.
        """
        try:
            return self._reader.append_bytes(opus).tobytes()
        except BaseException as error:  # a panic of sphn's is no Exception
            raise ValueError(str(error)) from None


def main() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    with socket.socket(fileno=0) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(READY)
        requests, coders = connection.makefile("rb", BUFFER), {}
        while len(header := requests.read(REQUEST.size)) == REQUEST.size:
            number, kind, size = REQUEST.unpack(header)
            payload = requests.read(size)
            if kind == OPEN:
                coders[number] = Streams(*RATE.unpack(payload))
            elif kind == CLOSE:
                del coders[number]
            else:
                connection.sendall(_answer(coders[number], kind, payload))


def _answer(coder: Streams, kind: int, payload: bytes) -> bytes:
    """What was asked for, or why there is none."""
    try:
        done, result = True, (coder.encode if kind == ENCODE else coder.decode)(payload)
    except ValueError as error:
        done, result = False, str(error).encode()
    return ANSWER.pack(done, len(result)) + result


if __name__ == "__main__":
    main()
