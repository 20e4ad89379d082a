"""From a config to a run: tokenizer, add-ons, images, optimisers.

Reading order: `build_run`, `build_training`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import pipelines
from flowrl.data.seeds import derive_seed
from flowrl.errors import ConfigError
from flowrl.pretrain.batches import Cut
from flowrl.pretrain.build import build_accelerator, build_cut, build_half
from flowrl.pretrain.loop import PretrainRun
from flowrl.pretrain.schema import run_folder
from flowrl.pretrain.step import Learner
from flowrl.pretrain.weights import TrainingWeights
from flowrl.tokenizer.batches import ImageBatches
from flowrl.tokenizer.images import load_images, stack, to_float
from flowrl.tokenizer.schema import TokenizerConfig
from flowrl.tokenizer.step import AdversaryNetwork, LossNetwork
from flowrl.tokenizer.task import TokenizerTask
from tokenizers_vis.addons.dropout import TokenDropout
from tokenizers_vis.addons.registry import make_addon
from tokenizers_vis.registry import load_pretrained, make_tokenizer
from tokenizers_vis.tokenizer import VisualTokenizer
from tokenizers_vis.training import TokenizerTraining

_SHAPES = "shapes"


def build_run(config: TokenizerConfig, *, where: str) -> PretrainRun:
    """The run of a config.

    Args:
        config: the run's.
        where: names its file in errors.

    Raises:
        ConfigError: parts that do not exist or do not fit together.
    """
    accelerator = build_accelerator(config)
    cut = build_cut(config, accelerator, where)
    training = build_training(config, where=where)
    tokenizer = training.tokenizer
    shape = tokenizer.sample_shape
    trained, measured = load_images(
        config.data, shape, seed=config.run.seed, num_held_out=config.eval.num_images, where=where
    )
    training.to(accelerator.device)
    weights = TrainingWeights(training, tokenizer, ema_decay=config.optim.ema_decay)
    return PretrainRun(
        config=config,
        folder=run_folder(config),
        accelerator=accelerator,
        learner=build_learner(config, training, weights, accelerator, cut),
        weights=weights,
        batches=ImageBatches(
            trained,
            shape,
            cut,
            seed=config.run.seed,
            random_crop=config.data.crop == "random",
            flip=config.data.flip,
            workers=config.data.workers,
        ),
        task=TokenizerTask(config, training, stack(measured, shape)),
    )


def build_training(config: TokenizerConfig, *, where: str) -> TokenizerTraining:
    """Tokenizer, dropout and add-ons, their weights drawn from the run's seed."""
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    tokenizer = build_tokenizer(config, where=where)
    dropout, mode = None, config.dropout.mode
    if mode != "none":
        dropout = TokenDropout(mode, config.dropout.full)
    addons = {}
    for number, addon in enumerate(config.addons):
        try:
            made = make_addon(addon.name, addon.args)
        except (LookupError, ValueError) as error:
            raise ConfigError(f"{where}: addons.{number}: {error}") from error
        addons[addon.name.rpartition(":")[2]] = made
    try:
        return TokenizerTraining(tokenizer, dropout=dropout, addons=addons)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def build_tokenizer(config: TokenizerConfig, *, where: str) -> VisualTokenizer:
    """A new tokenizer, or the one that training starts from."""
    section = config.tokenizer
    if section.start_from is not None:
        try:
            return load_pretrained(section.start_from)
        except (LookupError, ValueError, OSError) as error:
            raise ConfigError(
                f"{where}: tokenizer.start_from={section.start_from}: {error}"
            ) from error
    args, autoencoder = dict(section.args), None
    source = args.get("autoencoder")
    if isinstance(source, str):
        args["autoencoder"], autoencoder = load_autoencoder(source, where=where)
    assert section.name is not None  # the schema has seen to it
    try:
        tokenizer = make_tokenizer(section.name, args)
    except (LookupError, ValueError) as error:
        raise ConfigError(f"{where}: tokenizer: {error}") from error
    if autoencoder is not None:
        tokenizer.get_submodule("stage0.vae").load_state_dict(autoencoder)
    return tokenizer


def load_autoencoder(source: str, *, where: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Configuration and weights of a diffusers AutoencoderKL.

    Args:
        source: "shapes", a folder (the autoencoder's or a pipeline's with one in vae/), a Hub id.
        where: names the config's file in errors.
    """
    from diffusers import AutoencoderKL

    folder = pipelines.EMBEDDED[_SHAPES].folder if source == _SHAPES else Path(source)
    if (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    place = str(folder) if folder.is_dir() else source
    try:
        vae = AutoencoderKL.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: tokenizer.args.autoencoder={source}: {str(error).splitlines()[0]}; give "
            f"'{_SHAPES}', a diffusers AutoencoderKL folder or a Hub id"
        ) from error
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return {"_class_name": "AutoencoderKL", **config}, vae.state_dict()


def build_learner(
    config: TokenizerConfig,
    training: TokenizerTraining,
    weights: TrainingWeights,
    accelerator: Accelerator,
    cut: Cut,
) -> Learner:
    """Both halves, prepared."""
    optim, steps = config.optim, config.run.steps
    adversary = None
    adversaries = training.adversaries
    if adversaries:
        judge = AdversaryNetwork(adversaries).to(accelerator.device)
        lr = optim.adversary_lr or optim.lr
        adversary = build_half(judge, accelerator, optim, steps, lr=lr, betas=optim.adversary_betas)
        for parameter in adversary.parameters:
            parameter.requires_grad_(False)  # they are not the tokenizer's to move
    network = LossNetwork(training)
    rates = {"lr": optim.lr, "muon_lr": optim.muon_lr}
    main = build_half(network, accelerator, optim, steps, **rates, betas=optim.betas)
    return Learner(
        accelerator=accelerator,
        main=main,
        adversary=adversary,
        prepare=to_float,
        weights=weights,
        cut=cut,
        seed=config.run.seed,
        max_grad_norm=optim.max_grad_norm,
    )
