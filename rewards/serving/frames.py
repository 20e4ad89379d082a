"""Messages between a server and a reward's process: a letter, a length and that many bytes."""

from __future__ import annotations

import socket
import struct

DECLARES, ASKS, ANSWERS, FAILS, SPEC = b"D", b"Q", b"A", b"E", b"S"
_HEAD = struct.Struct("<cQ")


def send(link: socket.socket, kind: bytes, payload: bytes) -> None:
    """Send one message."""
    link.sendall(_HEAD.pack(kind, len(payload)))
    link.sendall(payload)


def receive(link: socket.socket) -> tuple[bytes, bytes]:
    """The next message: its letter and its bytes.

    Raises:
        EOFError: the other side has closed the link, or died.
    """
    kind, length = _HEAD.unpack(_exactly(link, _HEAD.size))
    return kind, _exactly(link, length)


def _exactly(link: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        got = link.recv_into(view[done:])
        if not got:
            raise EOFError("the other side closed the link")
        done += got
    return bytes(data)
