"""What the config of `flowrl tokenizer train` may hold; descriptions are its documentation.

Read by `load_tokenizer_config`, as strictly as a run's config; `TokenizerConfig`, at the end, names
the sections. docs/tokenizer_config.md is made from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from flowrl.config import read_record
from flowrl.pretrain.schema import (
    CheckpointSection,
    ComputeSection,
    EvalSection,
    OptimSection,
    RunSection,
    TrackSection,
    check_sections,
)
from flowrl.schema import Args
from flowrl.strict import Record


class TokenizerSection(Record):
    """What is trained: a new tokenizer, or one that there is already."""

    name: str | None = Field(
        default=None,
        min_length=1,
        description="name of the tokenizer, e.g. flextok, or package.module:Class",
    )
    args: Args = Field(
        default_factory=dict,
        description="numbers of the tokenizer; where it takes an autoencoder, this may be 'shapes' "
        "(the embedded one), a diffusers AutoencoderKL folder or a Hub id, whose weights are then "
        "loaded and frozen",
    )
    start_from: str | None = Field(
        default=None, min_length=1, description="folder or Hub id of a tokenizer to train further"
    )

    @model_validator(mode="after")
    def _is_one_of_both(self) -> TokenizerSection:
        if (self.name is None) == (self.start_from is None):
            raise ValueError("give either tokenizer.name or tokenizer.start_from")
        if self.start_from is not None and self.args:
            raise ValueError(
                "tokenizer.args would do nothing: tokenizer.start_from brings its own; leave them "
                "out"
            )
        return self


class DropoutSection(Record):
    """How many tokens a training image keeps, for tokenizers that can keep fewer than all."""

    mode: Literal["none", "uniform", "pow2", "pow2_ceil"] = Field(
        default="none",
        description="none = every image keeps all; uniform = any count; pow2 = a power of two or "
        "all, equally often; pow2_ceil = uniform, rounded up to the next power of two",
    )
    full: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of images that keep all tokens whatever is drawn",
    )

    @model_validator(mode="after")
    def _does_something(self) -> DropoutSection:
        if self.mode == "none" and self.full:
            raise ValueError(
                f"dropout.full={self.full} would do nothing with dropout.mode=none; set the mode"
            )
        return self


class AddOnSection(Record):
    """Further losses."""

    name: str = Field(
        min_length=1, description="name of the add-on, e.g. prior, or package.module:Class"
    )
    args: Args = Field(default_factory=dict, description="arguments of the add-on's constructor")


class DataSection(Record):
    """The images, resized to the tokenizer's size; for a tokenizer of clips, clips."""

    source: str = Field(
        min_length=1,
        description="'shapes' (rendered scenes), a folder of images, or a Hugging Face dataset: a "
        "Hub id or a local folder. For a tokenizer of clips 'shapes' (scenes in motion) or a "
        "folder of animated GIF, PNG or WebP files, videos (extra video) or folders of numbered "
        "stills; of N frames those in the middle of F equal parts are taken",
    )
    split: str = Field(default="train", min_length=1, description="split of a dataset")
    image_column: str = Field(default="image", min_length=1, description="column of a dataset")
    num_images: int | None = Field(
        default=None,
        ge=1,
        description="train on so many; null = all there are, of 'shapes' 20000",
    )
    held_out: int = Field(
        default=256,
        ge=1,
        description="images of a folder or dataset that are never trained on, the same for every "
        "seed; 'shapes' holds out combinations instead",
    )
    crop: Literal["center", "random"] = Field(
        default="center",
        description="what is cut to the tokenizer's shape after the shorter side was resized to "
        "it, of a clip in all frames alike; held-out images are always cut at the centre",
    )
    flip: bool = Field(
        default=False, description="mirror half of the training images or clips, drawn at random"
    )
    workers: int = Field(default=0, ge=0, description="processes that read images; 0 = this one")


class TokenizerConfig(Record):
    """Everything that defines a tokenizer's training."""

    run: RunSection = Field(description="the run")
    tokenizer: TokenizerSection = Field(description="what is trained")
    dropout: DropoutSection = Field(default=DropoutSection(), description="token dropout")
    addons: tuple[AddOnSection, ...] = Field(default=(), description="further losses")
    data: DataSection = Field(description="the images or clips")
    optim: OptimSection = Field(description="the optimiser")
    compute: ComputeSection = Field(default=ComputeSection(), description="how the work is cut up")
    eval: EvalSection = Field(default=EvalSection(), description="the held-out evaluation")
    checkpoint: CheckpointSection = Field(
        default=CheckpointSection(), description="when the state is saved"
    )
    track: TrackSection = Field(default=TrackSection(), description="where metrics go")

    @model_validator(mode="after")
    def _fits_together(self) -> TokenizerConfig:
        check_sections(self.run, self.optim, self.compute)
        names = [addon.name for addon in self.addons]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"addons names '{name}' {names.count(name)} times; keep one of them"
                )
        return self


def load_tokenizer_config(path: str | Path, overrides: Iterable[str] = ()) -> TokenizerConfig:
    """The configuration in a YAML file, with dotted overrides laid over it.

    Raises:
        ConfigError: with all problems, a line each, that name file, key and closest match.
    """
    return read_record(TokenizerConfig, path, overrides)[0]
