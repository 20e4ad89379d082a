"""The structural interfaces: what a pipeline, a policy and a reward must look like to be used.

Nothing inherits from these. A class of any package that has the members conforms; the checkers in
`flowrl.testing` say whether one does. The trainer sees `Policy` and `Trajectory`, never a pipeline;
a policy sees `FlowPipeline` or `TokenPipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from flowrl.types import Decisions, Metadata, PromptBatch, Rollout, Tree

Conditioning = Mapping[str, Tensor]


class FlowPipeline(Protocol):
    """A flow-matching generator as plain callables; `network` is what is trained.

    `encode` returns named tensors [P, ...], one row a prompt, on the CPU; `velocity` takes rows of
    them; `fingerprint` names everything that the embeddings depend on beside the prompts. `sigmas`
    is [T+1], descending, last 0. `decode` returns [B, 3, H, W] in [0, 1], and `encode_images` leads
    back to latents, always the same; of images of another size it raises a ValueError that names
    the model's. `embeds_guidance`: True =
    the guidance scale is an input of the network, which `velocity` finds as "guidance" [B] among
    the rows; False = guidance takes a second row, of the empty prompt.
    """

    embeds_guidance: bool
    network: nn.Module
    latent_shape: tuple[int, ...]
    fingerprint: str

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]: ...
    def release_encoders(self) -> None: ...
    def sigmas(self, num_steps: int) -> Tensor: ...
    def velocity(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def encode_images(self, images: Tensor) -> Tensor: ...
    def lora_targets(self) -> list[str]: ...
    def save_lora(self, folder: Path) -> None: ...
    def save_full(self, folder: Path) -> None: ...


class TokenPipeline(Protocol):
    """An autoregressive generator over a fixed vocabulary.

    `groups` are the positions that each step of a draw gives, int64 [g] each, all S = `num_tokens`
    of them once. `logits` is teacher-forced: whole sequences [B, S] and conditioning give
    [B, S, V], where a position sees the groups before its own only. `start` and `step` are the same
    law with a cache: `step` gives the logits [B, g, V] of the next group from tokens [B, S] of
    which the groups before it are filled in. `decode` turns whole sequences into [B, 3, H, W] in
    [0, 1]. `encode`, `fingerprint` and `embeds_guidance` are as FlowPipeline's.
    """

    embeds_guidance: bool
    network: nn.Module
    num_tokens: int
    groups: tuple[Tensor, ...]
    fingerprint: str

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]: ...
    def release_encoders(self) -> None: ...
    def logits(self, network: nn.Module, tokens: Tensor, conditioning: Conditioning) -> Tensor: ...
    def start(self, network: nn.Module, conditioning: Conditioning) -> Any: ...
    def step(self, network: nn.Module, state: Any, tokens: Tensor) -> Tensor: ...
    def decode(self, tokens: Tensor) -> Tensor: ...
    def save_full(self, folder: Path) -> None: ...


class Trajectory(Protocol):
    """What a rollout stored for training; only its policy can evaluate it."""

    @property
    def num_rows(self) -> int:
        """Network evaluations that scoring every decision takes."""
        ...

    @property
    def decisions(self) -> Decisions:
        """All stored decisions, in ascending order of row."""
        ...

    @property
    def unit(self) -> Tensor:
        """Int64 [E], ascending; decisions of one unit must be evaluated together, in one chunk."""
        ...

    @property
    def tree(self) -> Tree | None:
        """Which samples share which states; None where every sample is its own decision."""
        ...


class View(Protocol):
    """How a parameter set sees decisions: an `Evaluation`, or a `functional.matching.Matching`."""

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Name -> values per decision, to say which is not finite."""
        ...


@runtime_checkable
class Stepped(Protocol):
    """A trajectory whose decisions are sampler steps: `plan` drew it over `sigmas` [T+1]."""

    @property
    def plan(self) -> Any: ...
    @property
    def sigmas(self) -> Tensor: ...


class Policy(Protocol):
    """A generator that can be trained: it draws samples and scores what it drew.

    `rollout` runs without gradient; `evaluate` scores the decisions (an index [K] into
    `trajectory.decisions`, ascending) through the SAME transition function, with gradient.
    `plan` is what the method made for this step; only the policy reads it.
    """

    weights: Weights

    def rollout(self, batch: PromptBatch, plan: Any) -> tuple[Rollout, Trajectory]: ...
    def evaluate(self, trajectory: Any, index: Tensor) -> View: ...
    def sample(self, batch: PromptBatch, *, num_steps: int, guidance_scale: float) -> Rollout: ...
    def precompute(self, prompts: Sequence[str], folder: Path | None) -> None: ...
    def save(self, folder: Path) -> None: ...


class Weights(Protocol):
    """The parameter sets of a policy: current (trained), reference (frozen), ema (averaged), old.

    `use(name)` makes a set the one that `evaluate`, `rollout` and `sample` see, inside the `with`.
    `update_old(decay)` moves old towards current, keeping the share `decay` of itself.
    """

    network: nn.Module

    def use(self, name: str) -> AbstractContextManager[None]: ...
    def trainable(self) -> Iterator[nn.Parameter]: ...
    def update_ema(self, num_updates: int) -> None: ...
    def update_old(self, decay: float) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def save(self, pipeline: Any, folder: Path) -> None: ...


class Reward(Protocol):
    """Scores samples. NaN marks a sample that could not be scored; it is never trained as 0.

    `inputs` names what `score` takes among images ([B, 3, H, W] in [0, 1]), prompts ([B] str) and
    metadata ([B] mappings); all are passed by keyword. `score` returns [B].
    """

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def scope(self) -> str: ...
    @property
    def range(self) -> tuple[float, float]: ...
    @property
    def score(self) -> Callable[..., Tensor]: ...


__all__ = ["Conditioning", "FlowPipeline", "Metadata", "Policy", "Reward", "Stepped",
           "TokenPipeline", "Trajectory", "View", "Weights"]  # fmt: skip
