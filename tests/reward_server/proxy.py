"""Something between a client and a true server that spoils answers on their way."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from safetensors.torch import load, save

from rewards.serving.wire import (
    MEDIA_TYPE,
    Answer,
    decode_answer,
    decode_request,
    encode_answer,
)
from tests.reward_server.kit import PATIENT_S, http

Spoil = Callable[["Handler", bytes, bytes], None]  # the handler, the question, the true answer


class Handler(BaseHTTPRequestHandler):
    """Fetches the true answer, then lets the next spoiler of the script have its way with it."""

    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(200, http.get(self.server.behind + self.path).content)

    def do_POST(self) -> None:
        question = self.rfile.read(int(self.headers["Content-Length"]))
        answer = http.post(
            self.server.behind + self.path, content=question,
            headers={"Content-Type": MEDIA_TYPE},
        )  # fmt: skip
        self.server.num_asked += 1
        spoil = self.server.script.pop(0) if self.server.script else None
        if spoil is None:
            self.reply(answer.status_code, answer.content)
        else:
            spoil(self, question, answer.content)

    def reply(self, status: int, body: bytes, *, stated: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if stated is None else stated))
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        """Close the connection at once, as a process that dies does."""
        linger = struct.pack("ii", 1, 0)  # a reset, without what is still in the buffer
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Proxy(ThreadingHTTPServer):
    """In front of the server at `behind`; a context manager.

    Args:
        behind: URL of the true server.
        script: what happens to the answers of the next POSTs, in order; then nothing.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, behind: str, *script: Spoil) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind, self.script, self.num_asked = behind, list(script), 0
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


# --------------------------------------------------------------------------- spoilers


def status(code: int) -> Spoil:
    return lambda handler, question, answer: handler.reply(code, b'{"error": "injected"}')


def dropped(handler: Handler, question: bytes, answer: bytes) -> None:
    """The connection breaks; the true server has scored."""
    handler.hang_up()


def half_sent(handler: Handler, question: bytes, answer: bytes) -> None:
    handler.reply(200, answer[: len(answer) // 2], stated=len(answer))
    handler.hang_up()


def cut_off(handler: Handler, question: bytes, answer: bytes) -> None:
    handler.reply(200, answer[:-2])


def not_an_answer(handler: Handler, question: bytes, answer: bytes) -> None:
    handler.reply(200, b"<html>Welcome to the hotel's network</html>")


def silent(handler: Handler, question: bytes, answer: bytes) -> None:
    handler.server.over.wait(PATIENT_S)
    handler.hang_up()


def changed(change: Callable[[Answer], Answer]) -> Spoil:
    """A sound answer, but to something else."""

    def spoil(handler: Handler, question: bytes, answer: bytes) -> None:
        true = decode_answer(answer, decode_request(question))
        handler.reply(200, encode_answer(change(true)))

    return spoil


def doubles(handler: Handler, question: bytes, answer: bytes) -> None:
    text = answer[8 : 8 + int.from_bytes(answer[:8], "little")]
    metadata = json.loads(text)["__metadata__"]
    handler.reply(200, save({k: v.double() for k, v in load(answer).items()}, metadata))


reordered = changed(
    lambda true: replace(true, sample_ids=true.sample_ids[::-1], scores=true.scores.flip(0))
)
too_short = changed(
    lambda true: replace(true, sample_ids=true.sample_ids[:-1], scores=true.scores[:-1])
)
too_few_scores = changed(lambda true: replace(true, scores=true.scores[:-1]))
too_few_of_a_component = changed(lambda true: replace(true, components={"part": true.scores[:-1]}))
another_request = changed(lambda true: replace(true, request_id="0" * 32))
another_reward = changed(lambda true: replace(true, fingerprint="other"))
