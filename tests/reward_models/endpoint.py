"""An OpenAI-compatible endpoint on the loopback that answers as a test tells it to."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image

Reply = tuple[int, dict[str, str], bytes]


def completion(text: object, *, finish: str = "stop", log_probs: object = None) -> Reply:
    """A well-formed answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": log_probs}
    return body({"id": "x", "object": "chat.completion", "choices": [choice]})


def body(content: object, *, status: int = 200, **headers: str) -> Reply:
    """An answer of any content."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return status, {"Content-Length": str(len(data)), **headers}, data


def log_probs(*tokens: tuple[str, float]) -> dict[str, Any]:
    """Of a first token with these alternatives."""
    tops = [{"token": token, "logprob": value, "bytes": None} for token, value in tokens]
    return {"content": [{**tops[0], "top_logprobs": tops}]}


class Served:
    """What the endpoint at `url` was asked.

    Attributes:
        requests: (path, headers in lower case, body) of each, in order of arrival.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    def images(self, index: int = -1) -> list[Image.Image]:
        """The images of a request."""
        return images_of(self.requests[index][2])


def images_of(request: dict[str, Any]) -> list[Image.Image]:
    """The images of a request's first message; each must be a PNG data URL."""
    found = []
    for part in request["messages"][0]["content"]:
        if part["type"] == "image_url":
            kind, _, data = part["image_url"]["url"].partition(",")
            assert kind == "data:image/png;base64"
            found.append(Image.open(BytesIO(base64.b64decode(data, validate=True))))
    return found


@contextmanager
def serve(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[Served]:
    """Runs an endpoint that answers each request by `reply`, in as many threads as are asked."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(length))
            headers = {name.lower(): value for name, value in self.headers.items()}
            served.requests.append((self.path, headers, request))
            status, sent, data = reply(request)
            self.send_response(status)
            for name, value in sent.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = len(data) < int(sent["Content-Length"])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
