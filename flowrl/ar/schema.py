"""What the config of `flowrl ar train` may hold; descriptions are its documentation.

Read by `load_ar_config`, as strictly as a run's config; `ArConfig`, at the end, names the sections.
docs/ar_config.md is made from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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
from flowrl.schema import Args, Unit
from flowrl.strict import Record


class ModelSection(Record):
    """What is trained: a new generator on a tokenizer's ids, or a model that there is already."""

    generator: str | None = Field(
        default=None,
        min_length=1,
        description="name of the generator, e.g. raster, or package.module:Class",
    )
    args: Args = Field(
        default_factory=dict,
        description="numbers of the generator; num_words and text_length follow from the prompts",
    )
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="visual tokenizer: an embedded name such as shapes_vq, a folder or a Hub id",
    )
    texts: str = Field(
        default="shapes",
        min_length=1,
        description="tokenizer of the prompts: 'shapes' (a word is a token), or a folder or Hub id "
        "of transformers'",
    )
    text_length: int = Field(
        default=16, ge=1, description="tokens to which a prompt is padded or cut"
    )
    start_from: str | None = Field(
        default=None, min_length=1, description="folder or Hub id of a model to train further"
    )

    @model_validator(mode="after")
    def _is_one_of_both(self) -> ModelSection:
        if (self.generator is None) == (self.start_from is None):
            raise ValueError("give either model.generator or model.start_from")
        if self.generator is not None and self.tokenizer is None:
            raise ValueError("model.tokenizer is missing: the visual tokenizer whose ids are drawn")
        given = self.model_fields_set - {"start_from"}
        if self.start_from is not None and given:
            raise ValueError(
                f"model.{min(given)} would do nothing: model.start_from brings its own; leave it "
                "out"
            )
        return self


class DataSection(Record):
    """The captioned images; they are resized to the tokenizer's size and tokenised once."""

    source: str = Field(
        min_length=1,
        description="'shapes' (rendered scenes), or a JSONL file with a prompt and an image (a "
        "file, relative to it) per line",
    )
    num_images: int | None = Field(
        default=None,
        ge=1,
        description="train on so many; null = all there are, of 'shapes' 20000",
    )
    held_out: int = Field(
        default=256,
        ge=1,
        description="images of a file that are never trained on, the same for every seed; 'shapes' "
        "holds out combinations instead",
    )
    error_rate: Unit = Field(
        default=0.0, description="of 'shapes': share of what a prompt says that its image does not"
    )
    prompt_dropout: Unit = Field(
        default=0.1, description="share of prompts that are left empty, for guidance"
    )


class ArConfig(Record):
    """Everything that defines a generator's training."""

    run: RunSection = Field(description="the run")
    model: ModelSection = Field(description="what is trained")
    data: DataSection = Field(description="the captioned images")
    optim: OptimSection = Field(description="the optimiser")
    compute: ComputeSection = Field(default=ComputeSection(), description="how the work is cut up")
    eval: EvalSection = Field(default=EvalSection(), description="the held-out evaluation")
    checkpoint: CheckpointSection = Field(
        default=CheckpointSection(), description="when the state is saved"
    )
    track: TrackSection = Field(default=TrackSection(), description="where metrics go")

    @model_validator(mode="after")
    def _fits_together(self) -> ArConfig:
        check_sections(self.run, self.optim, self.compute)
        return self


def load_ar_config(path: str | Path, overrides: Iterable[str] = ()) -> ArConfig:
    """The configuration in a YAML file, with dotted overrides laid over it.

    Raises:
        ConfigError: with all problems, a line each, that name file, key and closest match.
    """
    return read_record(ArConfig, path, overrides)[0]
