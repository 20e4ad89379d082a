"""The parameter sets of a policy: current, reference, ema, old. They change places in one network.

`FullWeights` trains every parameter and keeps a frozen copy as the reference, if one is needed;
`LoraWeights` trains adapters, and the reference is the network with the adapter switched off;
`FrozenWeights` trains nothing, for sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.errors import ConfigError
from flowrl.functional.shapes import at_least_float32

_ADAPTER = "default"


class _Weights(ABC):
    """Trainable parameters by name, what follows them (ema, old), and the changing of places."""

    def __init__(
        self, network: nn.Module, *, ema_decay: float | None, with_old: bool = False
    ) -> None:
        self.network = network
        self.ema_decay = ema_decay
        # Full precision for what the optimiser moves: bf16 cannot hold an update of 1e-5.
        for parameter in self.trainable():
            parameter.data = at_least_float32(parameter.data)
        self.ema = None if ema_decay is None else self._copy()
        self.old = self._copy() if with_old else None

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters that the optimiser moves, in a fixed order."""
        return (p for p in self.network.parameters() if p.requires_grad)

    def update_ema(self, num_updates: int) -> None:
        """One step of the average, decay min(ema_decay, (1 + n) / (10 + n)) after n updates."""
        if self.ema is None or self.ema_decay is None:
            return
        decay = min(self.ema_decay, (1 + num_updates) / (10 + num_updates))
        self._follow(self.ema, decay)

    def update_old(self, decay: float) -> None:
        """Old becomes decay * old + (1 - decay) * current; 0 makes it current, 1 leaves it.

        Raises:
            ConfigError: the run does not keep it.
        """
        if self.old is None:
            raise ConfigError(_missing("old"))
        self._follow(self.old, decay)

    def _follow(self, values: dict[str, Tensor], decay: float) -> None:
        current = [p.detach() for p in self.trainable()]
        torch._foreach_lerp_(list(values.values()), current, 1 - decay)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside the `with`, the network computes with the named set.

        Raises:
            ConfigError: the run does not keep this set.
        """
        if name == "current":
            yield
        elif name == "ema" and self.ema is not None:
            with self._swapped(self.ema):
                yield
        elif name == "old" and self.old is not None:
            with self._swapped(self.old):
                yield
        elif name == "reference":
            with self._reference():
                yield
        else:
            raise ConfigError(_missing(name))

    def state_dict(self) -> dict[str, Any]:
        """The sets that change, as `current.NAME`, `ema.NAME` and `old.NAME`, detached."""
        sets = {"current": dict(self._named()), "ema": self.ema or {}, "old": self.old or {}}
        return {f"{s}.{name}": value for s, named in sets.items() for name, value in named.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies what `state_dict` gave into place; names and shapes must match exactly.

        Raises:
            ConfigError: they do not; nothing was copied.
        """
        mine = self.state_dict()
        # Compared beforehand: copy_ would stretch an adapter of rank 1 to any rank.
        here, there = ({(n, tuple(v.shape)) for n, v in s.items()} for s in (mine, state))
        if differ := here ^ there:
            name, shape = min(differ)
            raise ConfigError(
                f"the checkpoint's weights are not this run's: {len(differ)} names or shapes are "
                f"only in one of them, e.g. {name} {list(shape)}; resume with the model, tuning "
                "and EMA it was made with, and the method that keeps or does not keep 'old'"
            )
        for name, value in mine.items():
            value.copy_(state[name])

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, p.data) for n, p in self.network.named_parameters() if p.requires_grad)

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._named()}

    @contextmanager
    def _swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        self._exchange(values)
        try:
            yield
        finally:
            self._exchange(values)

    def _exchange(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                parameter.data, values[name] = values[name], parameter.data

    @abstractmethod
    def save(self, pipeline: Any, folder: Path) -> None: ...

    @abstractmethod
    def _reference(self) -> AbstractContextManager[None]: ...


class FullWeights(_Weights):
    """Every parameter is trained; the reference is a frozen copy, kept only on request."""

    def __init__(
        self,
        network: nn.Module,
        *,
        with_reference: bool,
        ema_decay: float | None = None,
        with_old: bool = False,
    ) -> None:
        network.requires_grad_(True)
        super().__init__(network, ema_decay=ema_decay, with_old=with_old)
        self.reference = self._copy() if with_reference else None

    def save(self, pipeline: Any, folder: Path) -> None:
        """Writes a complete model folder."""
        pipeline.save_full(folder)

    def _reference(self) -> AbstractContextManager[None]:
        if self.reference is None:
            raise ConfigError("full tuning keeps no reference copy unless the method looks at it")
        return self._swapped(self.reference)


class LoraWeights(_Weights):
    """Adapters on a frozen diffusers network; the reference is the network without them."""

    def __init__(
        self,
        network: nn.Module,
        *,
        rank: int,
        alpha: float,
        target_modules: list[str],
        seed: int,
        ema_decay: float | None = None,
        with_old: bool = False,
    ) -> None:
        from peft import LoraConfig

        network.requires_grad_(False)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=target_modules, init_lora_weights="gaussian"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.add_adapter(config, adapter_name=_ADAPTER)
        super().__init__(network, ema_decay=ema_decay, with_old=with_old)

    @contextmanager
    def _reference(self) -> Iterator[None]:
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    def save(self, pipeline: Any, folder: Path) -> None:
        """Writes the adapter alone."""
        pipeline.save_lora(folder)


class FrozenWeights(_Weights):
    """A network that is only sampled: nothing is trained, averaged or kept in full precision."""

    def __init__(self, network: nn.Module) -> None:
        network.requires_grad_(False)
        super().__init__(network, ema_decay=None)

    def save(self, pipeline: Any, folder: Path) -> None:
        """Writes a complete model folder."""
        pipeline.save_full(folder)

    def _reference(self) -> AbstractContextManager[None]:
        return nullcontext()


def _missing(name: str) -> str:
    """Why a set cannot be used."""
    return (
        f"this run keeps no {name!r} weights; set optim.ema_decay for 'ema', use a method that "
        "keeps 'old', or choose 'current' or 'reference'"
    )
