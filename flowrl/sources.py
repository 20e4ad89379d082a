"""What a config names, found and loaded: models, rewards, prompts and pairs.

Errors of the siblings, which know nothing of flowrl, become `ConfigError`s here, with the config's
file and key. Reading order: `build_pipeline`, `build_rewards`, `load_named_prompts`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from flowrl.calls import check_call
from flowrl.data.pairs import load_images
from flowrl.data.prompts import load_prompts
from flowrl.errors import ConfigError, closest
from flowrl.plugins import find_plugin
from flowrl.protocols import FlowPipeline
from flowrl.schema import RewardConfig, ScoringConfig
from flowrl.train.attempts import Patience
from flowrl.train.scoring import RewardSet
from flowrl.types import Prompt

# Arguments of an adapter that do not come from model.args.
ADAPTER_KEYS = (
    "source", "revision", "height", "width", "max_sequence_length", "dtype", "device",
)  # fmt: skip
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelSource(Protocol):
    """Which model, and how it is loaded: the config's section `model` or what MODEL stands for.

    `id` is an embedded name, a folder or a Hub id; a size of None is the model's own.
    """

    @property
    def pipeline(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def height(self) -> int | None: ...
    @property
    def width(self) -> int | None: ...
    @property
    def max_sequence_length(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def args(self) -> Mapping[str, Any]: ...


def build_pipeline(model: ModelSource, where: str, device: torch.device) -> Any:
    """The pipeline adapter that `model.pipeline` names, around the model.

    Raises:
        ConfigError: there is no such adapter, or the model cannot be loaded.
    """
    adapter = find_adapter(model, where)
    args = check_call(adapter, model.args, where=f"{where}: model.args", given=ADAPTER_KEYS)
    with loading(f"{where}: model.id={model.id}"):
        return adapter(
            resolve_model(model.id),
            revision=model.revision,
            height=model.height,
            width=model.width,
            max_sequence_length=model.max_sequence_length,
            dtype=_DTYPES[model.dtype],
            device=device,
            **args,
        )


def find_adapter(model: ModelSource, where: str) -> Any:
    """The class that `model.pipeline` names.

    Raises:
        ConfigError: there is no such adapter.
    """
    from pipelines import PIPELINES

    if model.pipeline not in PIPELINES:
        here = f"{where}: model.pipeline={model.pipeline}"
        return find_plugin(model.pipeline, "pipeline", PIPELINES, where=here)
    module, _, name = PIPELINES[model.pipeline].partition(":")
    return getattr(importlib.import_module(module), name)


def embedded_model(name: str) -> Any:
    """What `pipelines.EMBEDDED` says of a name; None for a folder or a Hub id."""
    from pipelines import EMBEDDED

    return EMBEDDED.get(name)


def resolve_model(name: str) -> str:
    """The folder of an embedded model, or the name as it is (a folder or a Hub id).

    Raises:
        FileNotFoundError: it is none of the three.
    """
    from pipelines import EMBEDDED

    if name in EMBEDDED:
        return str(EMBEDDED[name].folder)
    if "/" not in name and not Path(name).is_dir():
        raise FileNotFoundError(
            f"{name} is neither a folder, a Hub id (OWNER/NAME) nor an embedded model; "
            + closest(name, EMBEDDED)
        )
    return name


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns what can go wrong while a model is loaded into a ConfigError; no bars on the way."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (OSError, FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{what} cannot be loaded: {error}") from error


def build_rewards(
    rewards: Sequence[RewardConfig], scoring: ScoringConfig | None = None, *, where: str
) -> RewardSet:
    """The rewards by name, dotted path or file, called as the config says."""
    from rewards import load

    built = []
    for reward in rewards:
        try:
            built.append((reward.label, load(reward.name, **reward.args), reward.weight))
        except (LookupError, ValueError, TypeError, ImportError, ConnectionError) as error:
            text = error.args[0] if error.args else error
            raise ConfigError(f"{where}: {reward.name}: {text}") from error
    scoring = scoring or ScoringConfig()
    patience = Patience(scoring.retries, scoring.backoff_s, scoring.timeout_s)
    return RewardSet(built, batch_size=scoring.batch_size, patience=patience)


def check_size(pipeline: FlowPipeline, pairs: Sequence[Prompt], where: str) -> None:
    """Refuses images of another size than the model's; those of all pairs have one size.

    Raises:
        ConfigError: naming both sizes.
    """
    image = pairs[0].images[0]
    try:
        pipeline.encode_images(load_images([image]))
    except ValueError as error:
        raise ConfigError(
            f"{where}: data.train: {image}: {error}; resize the images of the data set, or set "
            "model.height and model.width"
        ) from error


def load_named_prompts(source: str, *, where: str) -> tuple[Prompt, ...]:
    """Prompts of the Shapes world by name, or of a file."""
    from rewards.shapes.prompts import heldout_rows, train_rows

    named = {"shapes/train": train_rows, "shapes/heldout": heldout_rows}
    if source in named:
        return tuple(Prompt(row["prompt"], row) for row in named[source]())
    if source.startswith("shapes/"):
        raise ConfigError(f"{where}={source} is not a prompt set; {closest(source, named)}")
    return load_prompts(source, where=where)


def require_ours(*names: str) -> None:
    """Refuses a foreign top-level package that shadows ours, before it is executed.

    Raises:
        ConfigError: naming both paths.
    """
    root = Path(__file__).resolve().parent.parent
    for name in names:
        spec = importlib.util.find_spec(name)
        places = (
            [Path(p).resolve() for p in (spec.submodule_search_locations or [])] if spec else []
        )
        if places != [root / name]:
            found = places[0] if places else "nothing"
            raise ConfigError(
                f"the import name '{name}' leads to {found}, not to flowrl's {root / name}; "
                "run from another folder, or take the foreign package off PYTHONPATH"
            )
