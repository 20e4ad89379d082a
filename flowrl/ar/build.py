"""From a config to a run: generator, tokenizers, captioned images, optimiser.

Reading order: `build_run`, `build_model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import pipelines
from flowrl.ar.data import PairBatches, load_pairs
from flowrl.ar.schema import ArConfig, ModelSection
from flowrl.ar.step import LossNetwork
from flowrl.ar.task import ArTask
from flowrl.data.seeds import derive_seed
from flowrl.errors import ConfigError
from flowrl.pretrain.build import build_accelerator, build_cut, build_half
from flowrl.pretrain.loop import PretrainRun
from flowrl.pretrain.schema import run_folder
from flowrl.pretrain.step import Learner
from flowrl.pretrain.weights import TrainingWeights
from pipelines.ar.pipeline import Autoregressive
from pipelines.ar.registry import Model, load_model, make_generator
from tokenizers_vis.registry import embedded, load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_run(config: ArConfig, *, where: str) -> PretrainRun:
    """The run of a config.

    Args:
        config: the run's.
        where: names its file in errors.

    Raises:
        ConfigError: parts that do not exist or do not fit together.
    """
    from accelerate.utils import send_to_device

    accelerator = build_accelerator(config)
    cut = build_cut(config, accelerator, where)
    model = build_model(config, where=where)
    model.generator.to(accelerator.device).train()
    model.tokenizer.to(accelerator.device)
    words = Autoregressive.of(model).words
    trained, held_out = load_pairs(
        config.data,
        model.tokenizer,
        words,
        seed=config.run.seed,
        num_held_out=config.eval.num_images,
        where=where,
    )
    network, optim = LossNetwork(model.generator), config.optim
    weights = TrainingWeights(network, model.generator, ema_decay=optim.ema_decay)
    rates: dict[str, Any] = {"lr": optim.lr, "muon_lr": optim.muon_lr, "betas": optim.betas}
    learner = Learner(
        accelerator=accelerator,
        main=build_half(network, accelerator, optim, config.run.steps, **rates),
        adversary=None,
        prepare=send_to_device,
        weights=weights,
        cut=cut,
        seed=config.run.seed,
        max_grad_norm=optim.max_grad_norm,
    )
    batches = PairBatches(
        trained, words([""])[0], cut, seed=config.run.seed, dropout=config.data.prompt_dropout
    )
    return PretrainRun(
        config=config,
        folder=run_folder(config),
        accelerator=accelerator,
        learner=learner,
        weights=weights,
        batches=batches,
        task=ArTask(config, model, held_out),
    )


def build_model(config: ArConfig, *, where: str) -> Model:
    """A new generator with its tokenizers, its weights drawn from the seed, or one to go on from.

    Raises:
        ConfigError: a part that does not exist or does not fit.
    """
    section = config.model
    if section.start_from is not None:
        try:
            return load_model(section.start_from)
        except (LookupError, ValueError, OSError) as error:
            raise ConfigError(f"{where}: model.start_from={section.start_from}: {error}") from error
    assert section.generator is not None and section.tokenizer is not None  # the schema's care
    try:
        tokenizer = load_pretrained(section.tokenizer).requires_grad_(False)
    except (LookupError, ValueError, OSError) as error:
        raise ConfigError(f"{where}: model.tokenizer={section.tokenizer}: {error}") from error
    texts = build_texts(section, where)
    for key in ("num_words", "text_length"):
        if key in section.args:
            raise ConfigError(
                f"{where}: model.args.{key} follows from model.texts and model.text_length; leave "
                "it out"
            )
    args = {**section.args, "num_words": len(texts), "text_length": section.text_length}
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    try:
        generator = make_generator(section.generator, args, tokenizer)
    except (LookupError, ValueError) as error:
        raise ConfigError(f"{where}: model: {error}") from error
    source = section.tokenizer if section.tokenizer in embedded() else None
    return Model(generator, tokenizer, texts, source)


def build_texts(section: ModelSection, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the prompts.

    Raises:
        ConfigError: there is none, or it has no token to pad with.
    """
    from transformers import AutoTokenizer

    is_ours = section.texts == "shapes"
    source = str(pipelines.EMBEDDED["shapes"].folder / "tokenizer") if is_ours else section.texts
    try:
        texts = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: model.texts={section.texts}: {str(error).splitlines()[0]}; give 'shapes', "
            "or a folder or Hub id of a transformers tokenizer"
        ) from error
    if texts.pad_token is None:
        raise ConfigError(f"{where}: model.texts={section.texts} has no padding token")
    return texts  # type: ignore[no-any-return]
