"""The other end of `worker`: makes one reward and scores what arrives until the link closes.

Needs torch, safetensors and pillow, and what the reward itself imports; nothing else of flowrl.
"""

from __future__ import annotations

import json
import signal
import socket
import traceback

from rewards.registry import make
from rewards.serving import frames, wire
from rewards.serving.calls import RewardFailed, Served, call, declare


def main(descriptor: int) -> None:
    """Serve the reward that the first message names, over an inherited socket."""
    # Ctrl-C reaches the whole group; the server ends this process when its requests are done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = socket.socket(fileno=descriptor)
    _, text = frames.receive(link)
    spec = json.loads(text)
    try:
        reward = make(spec["name"], **spec["args"])
        declared = declare(spec["name"], reward)
    except Exception as error:
        traceback.print_exc()
        frames.send(link, frames.FAILS, f"{type(error).__name__}: {_words(error)}".encode())
        return
    served = Served(spec["name"], reward, declared)
    frames.send(link, frames.DECLARES, json.dumps(declared.to_json()).encode())
    while True:
        try:
            _, body = frames.receive(link)
        except EOFError:
            return
        frames.send(link, *_answer(served, body))


def _answer(served: Served, body: bytes) -> tuple[bytes, bytes]:
    try:
        # The server has checked and bounded what it passes on.
        asked = wire.decode_request(body, wire.Limits(max_samples=2**31, max_pixels=2**62))
        values = call(served, asked)
    except (RewardFailed, wire.WireError) as error:
        return frames.FAILS, str(error).encode()
    answer = wire.Answer(
        asked.reward, asked.request_id, asked.sample_ids, "", values.pop("score"), values
    )
    return frames.ANSWERS, wire.encode_answer(answer)


def _words(error: Exception) -> object:
    """A KeyError's own text puts its message in quotes."""
    return error.args[0] if isinstance(error, LookupError) and error.args else error
