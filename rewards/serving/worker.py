"""A reward in a process of its own, with the interpreter of another environment if asked.

For rewards whose dependencies conflict with each other's, that crash, or that would hold the
interpreter's lock for long. A process that dies is started anew and its request sent once more;
one that does not answer in time is replaced. Used like any reward. The same bytes travel as over
HTTP (`wire`), on a socket pair. Reading order: `start_worker`, `_Process.ask`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import rewards
from rewards.serving import frames, wire
from rewards.serving.calls import SCORE, Declaration, RewardFailed, read_declaration
from rewards.serving.pieces import Values

# Puts our `rewards`, and nothing beside it, before the other environment's own packages.
_BOOT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "rewards", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
sys.modules["rewards"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from rewards.serving.child import main
main(int(sys.argv[2]))
"""


def start_worker(
    name: str,
    args: Mapping[str, Any],
    *,
    python: str | None = None,
    timeout_s: float = 600.0,
) -> WorkerReward | WorkerJudge:
    """A reward, or judge of pairs, that lives in a process of its own; the process is started.

    Args:
        name: as `rewards.load` takes it.
        args: of the reward; JSON's values.
        python: the interpreter that runs it; None = this one.
        timeout_s: after which a process that does not answer is ended, and started anew by the
            next request.

    Raises:
        ValueError: the process cannot be started, or the reward cannot be made in it.
    """
    process = _Process(name, args, python or sys.executable, timeout_s)
    try:
        declared = process.start()
    except RewardFailed as error:
        raise ValueError(f"{error} (in a process of {process.python})") from error
    return (WorkerJudge if declared.kind == "judge" else WorkerReward)(process, declared)


class _Worker:
    """What a reward and a judge in a process share."""

    def __init__(self, process: _Process, declared: Declaration) -> None:
        self.inputs = declared.inputs
        self._process, self._declared, self._num_asked = process, declared, 0

    @property
    def num_restarts(self) -> int:
        """Times that the process was started anew."""
        return self._process.num_starts - 1

    @property
    def pid(self) -> int:
        """Of the process that runs now, or ran last."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def _ask(self, images: Mapping[str, Tensor], prompts: Any, metadata: Any, num: int) -> Values:
        self._num_asked += 1
        request = wire.Request(
            reward=self._process.name,
            request_id=str(self._num_asked),
            sample_ids=tuple(map(str, range(num))),
            images=images,
            prompts=None if prompts is None else tuple(prompts),
            metadata=None if metadata is None else tuple(metadata),
        )
        return self._process.ask(request)


class WorkerReward(_Worker):
    """A reward whose calls are answered by its process; see `rewards.base.Reward`."""

    def __init__(self, process: _Process, declared: Declaration) -> None:
        super().__init__(process, declared)
        self.scope, self.range = declared.scope, declared.range
        self.higher_is_better = declared.higher_is_better

    def score(
        self,
        *,
        images: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor | Values:
        """Scores, float32 [B], or a mapping of them and their components.

        Raises:
            RewardFailed: the reward raised, or its process died twice or did not answer.
        """
        num = next(len(each) for each in (images, prompts, metadata) if each is not None)
        pictures = {} if images is None else {"images": images}
        values = self._ask(pictures, prompts, metadata, num)
        return values if len(values) > 1 else values[SCORE]


class WorkerJudge(_Worker):
    """A judge of pairs whose calls are answered by its process; see `rewards.pairwise.Judge`."""

    def compare(
        self,
        first: Tensor,
        second: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] = (),
    ) -> Tensor:
        """P(first wins), float32 [B]; raises as `WorkerReward.score`."""
        texts, rows = (
            each if each and name in self.inputs else None
            for name, each in (("prompts", prompts), ("metadata", metadata))
        )
        return self._ask({"first": first, "second": second}, texts, rows, len(first))[SCORE]


class _Process:
    """One process and the link to it; used by one thread at a time."""

    def __init__(self, name: str, args: Mapping[str, Any], python: str, timeout_s: float) -> None:
        self.name, self.python, self.num_starts, self.pid = name, python, 0, 0
        self._timeout_s = timeout_s
        self._spec = json.dumps({"name": name, "args": dict(args)}).encode()
        self._link: socket.socket | None = None
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> Declaration:
        """Start the process and wait until its reward is made.

        Raises:
            RewardFailed: there is no such interpreter, or the reward cannot be made.
        """
        ours, theirs = socket.socketpair()
        package = str(Path(rewards.__file__).parent)
        command = [self.python, "-c", _BOOT, package, str(theirs.fileno())]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        try:
            self._popen = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        except OSError as error:
            ours.close()
            raise RewardFailed(f"{self.python} cannot be run: {error}") from error
        finally:
            theirs.close()
        self.num_starts, self.pid, self._link = self.num_starts + 1, self._popen.pid, ours
        ours.settimeout(self._timeout_s)
        try:
            frames.send(ours, frames.SPEC, self._spec)
            kind, payload = frames.receive(ours)
        except (OSError, EOFError) as error:
            raise RewardFailed(
                f"the process of reward {self.name!r} ended before it was ready "
                f"({self._end()}); its output says why"
            ) from error
        if kind == frames.FAILS:
            self._end()
            raise RewardFailed(payload.decode())
        return read_declaration(self.name, json.loads(payload))

    def ask(self, request: wire.Request) -> Values:
        """The scores of a request and their components; a process that dies is tried once more.

        Raises:
            RewardFailed: the reward raised, or its process died twice or did not answer.
        """
        body = wire.encode_request(request)
        for last in (False, True):
            if self._link is None:
                self.start()
            assert self._link is not None
            try:
                frames.send(self._link, frames.ASKS, body)
                kind, payload = frames.receive(self._link)
            except TimeoutError as error:
                self._end()
                raise RewardFailed(
                    f"reward {self.name!r} did not answer within {self._timeout_s:g} s; its "
                    "process was ended and starts anew with the next request"
                ) from error
            except (OSError, EOFError) as error:
                ended = self._end()
                if last:
                    raise RewardFailed(
                        f"the process of reward {self.name!r} died twice on this request ({ended})"
                    ) from error
                continue
            if kind == frames.FAILS:
                raise RewardFailed(payload.decode())
            answer = wire.decode_answer(payload, request)
            return {SCORE: answer.scores, **answer.components}
        raise AssertionError

    def close(self) -> None:
        """Let the process end by itself, or end it."""
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._popen is not None:
            try:
                self._popen.wait(5)
            except subprocess.TimeoutExpired:
                self._end()

    def _end(self) -> str:
        """End what may be left of the process; how it ended, in words."""
        assert self._popen is not None
        if self._link is not None:
            self._link.close()
            self._link = None
        try:
            code = self._popen.wait(1)  # a process that dies closes its link a moment earlier
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
            return "it was killed here"
        return f"signal {-code}" if code < 0 else f"exit code {code}"
