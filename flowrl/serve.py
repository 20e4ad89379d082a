"""The reward server's strict YAML file, and the rewards, app and socket that follow from it.

Reading order: `ServerConfig`, `load_server`, `build_server`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from flowrl import __version__
from flowrl.errors import ConfigError, MissingDependency
from flowrl.schema import RewardConfig
from flowrl.strict import Record, validate
from flowrl.yamlio import read_yaml

Args = dict[str, Any]


class ServedConfig(Record):
    """One reward, or judge of pairs, that is served."""

    name: str = Field(min_length=1, description="name of the reward, as a run's config takes it")
    label: str | None = Field(
        default=None, min_length=1, description="name by which clients ask for it; null = its name"
    )
    args: Args = Field(default_factory=dict, description="arguments of the reward's constructor")
    process: bool = Field(default=False, description="run it in a process of its own")
    python: str | None = Field(
        default=None,
        min_length=1,
        description="interpreter of that process, such as venvs/pick/bin/python; null = this one",
    )
    timeout_s: float = Field(
        default=600.0, gt=0, description="seconds after which a silent process is replaced"
    )

    @property
    def served_as(self) -> str:
        """The name by which clients ask for it."""
        return self.label or RewardConfig(name=self.name).label

    @model_validator(mode="after")
    def _fits_together(self) -> ServedConfig:
        if self.python is not None and not self.process:
            raise ValueError(
                f"rewards: {self.name}: python={self.python} needs a process of its own; set "
                "process: true"
            )
        return self


class ServerConfig(Record):
    """A reward server's file."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="address to listen on; 127.0.0.1 = this "
        "machine only, 0.0.0.0 = every network"
    )  # fmt: skip
    port: int = Field(default=8700, ge=0, le=65535, description="port; 0 = a free one")
    token_env: str | None = Field(
        default=None,
        min_length=1,
        description="environment variable with the token that clients must bear; null = none",
    )
    max_body_mb: float = Field(default=256.0, gt=0, description="bytes of a request, MB of 1e6")
    max_batch: int = Field(default=64, ge=1, description="samples per call of a reward")
    max_wait_ms: float = Field(
        default=5.0, ge=0, description="time a request waits for others to be scored with, ms"
    )
    rewards: tuple[ServedConfig, ...] = Field(min_length=1, description="what is served")

    @model_validator(mode="after")
    def _fits_together(self) -> ServerConfig:
        names = [reward.served_as for reward in self.rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"rewards: '{name}' is served {names.count(name)} times; give each a label of "
                    "its own"
                )
        if self.token_env is None and not _is_loopback(self.host):
            raise ValueError(
                f"host={self.host} can be reached from other machines, but token_env is not set, "
                "so anybody there could use this server; set token_env, or host: 127.0.0.1"
            )
        return self


def load_server(file: Path) -> ServerConfig:
    """The configuration in a YAML file.

    Raises:
        ConfigError: for whatever is not understood; names file and key.
    """
    data = read_yaml(file)
    return validate(ServerConfig, data, where=str(file), sources={}, has_overrides=False)


def serve(file: Path) -> None:
    """Serve what a file says until a signal.

    Raises:
        ConfigError: the file, a reward, the token or the address is not right.
        MissingDependency: fastapi or uvicorn is not installed.
        KeyboardInterrupt: stopped by SIGINT, after the requests inside were answered.
    """
    config = load_server(file)  # before torch is loaded: a typo answers at once
    token = _token(config, str(file))
    from flowrl.sources import require_ours

    require_ours("rewards")
    try:
        from rewards.serving import server
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"the reward server needs {error.name}; run: pip install fastapi uvicorn"
        ) from error
    with _made(config.rewards, str(file)) as served:
        settings = server.Settings(
            token=token,
            max_body=int(config.max_body_mb * 1e6),
            max_batch=config.max_batch,
            max_wait_s=config.max_wait_ms / 1000,
            version=__version__,
        )
        app = server.create_app(served, settings)
        try:
            listener = server.listen(config.host, config.port)
        except OSError as error:
            raise ConfigError(
                f"{file}: cannot listen on {config.host} port {config.port}: {error.strerror}; "
                "choose another host or port (0 = a free one)"
            ) from error
        port = listener.getsockname()[1]
        shown = f"[{config.host}]" if ":" in config.host else config.host
        names = ", ".join(reward.served_as for reward in config.rewards)
        print(f"serving {names} on http://{shown}:{port} (Ctrl-C stops)", flush=True)
        server.run(app, listener)


def fingerprint(reward: ServedConfig) -> str:
    """Differs where a reward's name, arguments or release differ."""
    text = json.dumps([reward.name, reward.args, __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _made(rewards: Sequence[ServedConfig], where: str) -> Iterator[list[Any]]:
    """The rewards, made; their processes end with the block."""
    from rewards.registry import make
    from rewards.serving.calls import Served, declare
    from rewards.serving.worker import start_worker

    served, processes = [], []
    try:
        for reward in rewards:
            try:
                made: Any
                if reward.process:
                    made = start_worker(
                        reward.name,
                        reward.args,
                        python=reward.python,
                        timeout_s=reward.timeout_s,
                    )
                    processes.append(made)
                else:
                    made = make(reward.name, **reward.args)
                declared = declare(reward.name, made, fingerprint(reward))
            except (LookupError, ValueError, TypeError, ImportError) as error:
                text = error.args[0] if error.args else error
                raise ConfigError(f"{where}: rewards: {reward.name}: {text}") from error
            served.append(Served(reward.served_as, made, declared))
        yield served
    finally:
        for process in processes:
            process.close()


def _token(config: ServerConfig, where: str) -> str | None:
    if config.token_env is None:
        return None
    token = os.environ.get(config.token_env, "").strip()
    if not token.isascii() or not token.isprintable() or not token:
        raise ConfigError(
            f"{where}: token_env={config.token_env}: expected an environment variable of that name "
            "that holds a token of printable ASCII; set it before the server starts"
        )
    return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
