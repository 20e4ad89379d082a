"""Generators by name, and the folder that an autoregressive model is saved as.

config.json          generator, args, visual_tokenizer (a name or Hub id; absent = the folder)
model.safetensors    the generator's weights
text_tokenizer/      transformers' tokenizer of the prompts
visual_tokenizer/    tokenizers_vis's, unless config.json names one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipelines.ar.generator import Generator
from tokenizers_vis.lookup import find_class, local_folder
from tokenizers_vis.registry import load_pretrained, read_config, save_pretrained
from tokenizers_vis.tokenizer import VisualTokenizer
from tokenizers_vis.weights import fit_weights, load_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# name -> module:class
GENERATORS = {"raster": "pipelines.ar.raster:Raster"}
CONFIG, WEIGHTS, TEXT, VISUAL = (
    "config.json", "model.safetensors", "text_tokenizer", "visual_tokenizer",
)  # fmt: skip


def generator_class(name: str) -> type[Generator]:
    """The class of a name: ours, or "package.module:Class".

    Raises:
        LookupError: there is none.
    """
    return find_class(name, GENERATORS, Generator, what="generator")  # type: ignore[type-abstract]


def make_generator(name: str, args: Mapping[str, Any], tokenizer: VisualTokenizer) -> Generator:
    """The generator of a name for a tokenizer's ids, with random weights.

    Raises:
        LookupError: there is no such generator.
        ValueError: an argument that does not exist or does not fit, or ids of another kind.
    """
    found: Any = generator_class(name)
    config = read_config(found.Config, args, where=name)
    if len(tokenizer.codebooks) != 1:
        raise ValueError(f"{name} draws from one codebook; {tokenizer.name} has several")
    return cast(Generator, found(config, tokenizer.layout, tokenizer.codebooks[0]))


@dataclass(frozen=True)
class Model:
    """The parts of an autoregressive model, as a folder holds them.

    Attributes:
        generator: draws ids.
        tokenizer: ids to images, frozen.
        texts: transformers' tokenizer of the prompts.
        visual_source: the name or Hub id by which the tokenizer was loaded; None = it is saved
            beside the generator.
    """

    generator: Generator
    tokenizer: VisualTokenizer
    texts: PreTrainedTokenizerBase
    visual_source: str | None = None


def save_model(model: Model, folder: Path) -> None:
    """Writes all parts into a folder, which is made if need be."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = {
        "generator": model.generator.name, "args": model.generator.config_dict(),
    }  # fmt: skip
    if model.visual_source is None:
        save_pretrained(model.tokenizer, folder / VISUAL)
    else:
        stored["visual_tokenizer"] = model.visual_source
    (folder / CONFIG).write_text(json.dumps(stored, indent=2) + "\n")
    state = {name: value.contiguous().cpu() for name, value in model.generator.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    model.texts.save_pretrained(folder / TEXT)


def load_model(source: Path | str, *, revision: str | None = None) -> Model:
    """The model of a folder or Hub id, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        LookupError: there is no generator or tokenizer of that name.
        ValueError: weights that do not fit.
    """
    from transformers import AutoTokenizer

    folder = local_folder(source, revision=revision, ours={})
    for name in (CONFIG, WEIGHTS, TEXT):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{source}: {name} is missing; an autoregressive model has {CONFIG}, {WEIGHTS}, "
                f"{TEXT}/ and a visual tokenizer"
            )
    stored = json.loads((folder / CONFIG).read_text())
    if not isinstance(stored, dict) or "generator" not in stored:
        raise ValueError(f"{folder / CONFIG} does not name a generator; was flowrl's written here?")
    visual = stored.get("visual_tokenizer")
    tokenizer = load_pretrained(folder / VISUAL if visual is None else visual)
    generator = make_generator(stored["generator"], stored.get("args", {}), tokenizer)
    fit_weights(generator, load_tensors(folder / WEIGHTS), where=str(folder / WEIGHTS))
    texts = AutoTokenizer.from_pretrained(folder / TEXT)
    return Model(generator.eval(), tokenizer.requires_grad_(False), texts, visual)
