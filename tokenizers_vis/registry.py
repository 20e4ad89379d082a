"""Finds a tokenizer by name, makes it, saves it, and loads it from the Hub or a folder.

A saved tokenizer is `config.json` (its name and numbers) and `model.safetensors`. Loading is
strict: huggingface_hub's mixin would leave missing weights at random values without a word.
Errors are plain LookupError, ValueError and FileNotFoundError with the closest match and the list.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from tokenizers_vis.lookup import check_arguments, find_class, local_folder
from tokenizers_vis.tokenizer import VisualTokenizer
from tokenizers_vis.weights import fit_weights, load_tensors

# name -> module:class
TOKENIZERS = {
    "grid": "tokenizers_vis.grid:GridTokenizer",
    "flextok": "tokenizers_vis.flextok:FlexTok",
    "larp": "tokenizers_vis.larp:Larp",
    "titok": "tokenizers_vis.titok:TiTok",
    "hieratok": "tokenizers_vis.hieratok:HieraTok",
    "tokenflow": "tokenizers_vis.tokenflow:TokenFlow",
    "hita": "tokenizers_vis.hita:Hita",
    "tokenflex": "tokenizers_vis.tokenflex:TokenFlex",
    "uniwetok": "tokenizers_vis.uniwetok:UniWeTok",
    "bitdance": "tokenizers_vis.bitdance:BitDance",
    "diffusers": "tokenizers_vis.published.diffusers_grid:DiffusersGrid",
    "flextok_published": "tokenizers_vis.published.flextok:PublishedFlexTok",
    "llamagen_vq": "tokenizers_vis.published.llamagen:LlamaGenVq",
    "titok_published": "tokenizers_vis.published.titok:PublishedTiTok",
}
PLUGINS = "flowrl.tokenizers"  # the entry-point group in which other distributions register theirs
_EMBEDDED = Path(__file__).parent / "weights"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def tokenizer_class(name: str) -> type[VisualTokenizer]:
    """The class of a name: ours, a plug-in's, or "package.module:Class".

    Raises:
        LookupError: there is none.
    """
    plugins = {point.name: point.value for point in entry_points(group=PLUGINS)}
    return find_class(
        name, {**TOKENIZERS, **plugins, **TOKENIZERS}, VisualTokenizer, what="tokenizer"
    )


def make_tokenizer(name: str, args: Mapping[str, Any] | None = None) -> VisualTokenizer:
    """The tokenizer of a name, with random weights.

    Args:
        name: as `tokenizer_class`.
        args: of its `Config`; lists stand for tuples.

    Raises:
        LookupError: there is no such tokenizer.
        ValueError: an argument that does not exist or does not fit.
    """
    found: Any = tokenizer_class(name)
    return cast(VisualTokenizer, found(read_config(found.Config, args or {}, where=name)))


def read_config(config: type[Any], args: Mapping[str, Any], *, where: str) -> Any:
    """A frozen record made of plain data, strictly.

    Raises:
        ValueError: an argument that does not exist, with the closest, or of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    check_arguments(args, [each.name for each in dataclasses.fields(config)], where=where)
    try:
        return TypeAdapter(config).validate_python(dict(args))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {key}: {first['msg']}, got {first['input']!r}") from error


def save_pretrained(tokenizer: VisualTokenizer, folder: Path | str) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, which is made if need be."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"tokenizer": tokenizer.name, "args": tokenizer.config_dict()}
    (folder / CONFIG).write_text(json.dumps(stored, indent=2) + "\n")
    state = {key: value.detach().cpu().clone() for key, value in tokenizer.state_dict().items()}
    save_file(state, folder / WEIGHTS)


def load_pretrained(source: Path | str, *, revision: str | None = None) -> VisualTokenizer:
    """The tokenizer of a folder or of a Hub id, in evaluation mode, on the CPU.

    Args:
        source: what `save_pretrained` wrote, a name of `embedded()`, or "NAME:SOURCE" for a
            checkpoint that others published and the tokenizer of that name reads, e.g.
            "titok_published:yucornetto/...".
        revision: on the Hub.

    Raises:
        LookupError: there is no tokenizer of that name.
        FileNotFoundError: a file is missing.
        ValueError: weights that do not fit the configuration, or a tokenizer without an adapter.
    """
    name, _, published = str(source).partition(":")
    if published and not Path(source).exists():
        return tokenizer_class(name).from_published(published, revision=revision)
    files = (CONFIG, WEIGHTS)
    folder = local_folder(source, revision=revision, ours=embedded(), files=files)
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{source}: {name} is missing; a tokenizer has both files")
    stored = json.loads((folder / CONFIG).read_text())
    if not isinstance(stored, dict) or "tokenizer" not in stored:
        raise ValueError(f"{folder / CONFIG} does not name a tokenizer; was flowrl's written here?")
    tokenizer = make_tokenizer(stored["tokenizer"], stored.get("args", {}))
    fit_weights(tokenizer, load_tensors(folder / WEIGHTS), where=str(folder / WEIGHTS))
    return tokenizer.eval()


def embedded() -> dict[str, Path]:
    """The folders of the trained tokenizers that live in this package, by name."""
    return {folder.name: folder for folder in sorted(_EMBEDDED.glob("*")) if folder.is_dir()}
