"""From a config to a run: tokenizer, add-ons, images, optimisers.

Reading order: `build_run`, `build_training`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

import pipelines
from flowrl.data.seeds import derive_seed
from flowrl.errors import ConfigError
from flowrl.precision import resolve_precision
from flowrl.tokenizer.batches import Batches, Cut
from flowrl.tokenizer.images import load_images, stack
from flowrl.tokenizer.loop import TokenizerRun
from flowrl.tokenizer.muon import MuonAdamW, block_matrices
from flowrl.tokenizer.schema import OptimSection, TokenizerConfig, run_folder
from flowrl.tokenizer.step import AdversaryNetwork, Half, Learner, LossNetwork
from flowrl.tokenizer.weights import TrainingWeights
from flowrl.train.schedule import LearningRate
from flowrl.train.track import require_trackers
from tokenizers_vis.addons.dropout import TokenDropout
from tokenizers_vis.addons.registry import make_addon
from tokenizers_vis.registry import load_pretrained, make_tokenizer
from tokenizers_vis.tokenizer import VisualTokenizer
from tokenizers_vis.training import TokenizerTraining

_SHAPES = "shapes"


def build_run(config: TokenizerConfig, *, where: str) -> TokenizerRun:
    """The run of a config.

    Args:
        config: the run's.
        where: names its file in errors.

    Raises:
        ConfigError: parts that do not exist or do not fit together.
    """
    require_trackers(config.track.trackers)
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=resolve_precision(config.compute.mixed_precision),
        log_with=list(config.track.trackers) or None,
        project_dir=str(run_folder(config)),
        step_scheduler_with_optimizer=False,
        # Which parameters a step uses may depend on how far training is: an add-on may still rest.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    cut = build_cut(config, accelerator, where)
    training = build_training(config, where=where)
    tokenizer = training.tokenizer
    shape = tokenizer.sample_shape
    trained, measured = load_images(
        config.data, shape, seed=config.run.seed, num_held_out=config.eval.num_images, where=where
    )
    weights = TrainingWeights(training.to(accelerator.device), ema_decay=config.optim.ema_decay)
    return TokenizerRun(
        config=config,
        folder=run_folder(config),
        accelerator=accelerator,
        learner=build_learner(config, training, weights, accelerator, cut),
        weights=weights,
        batches=Batches(
            trained,
            shape,
            cut,
            seed=config.run.seed,
            random_crop=config.data.crop == "random",
            flip=config.data.flip,
        ),
        held_out=stack(measured, shape),
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


def build_cut(config: TokenizerConfig, accelerator: Accelerator, where: str) -> Cut:
    """How a batch is shared out.

    Raises:
        ConfigError: it does not divide.
    """
    total, world = config.compute.batch_size, accelerator.num_processes
    micro = config.compute.micro_batch_size or total // world
    if not micro or total % (micro * world):
        raise ConfigError(
            f"{where}: compute.batch_size={total} does not divide into {world} processes x "
            f"micro-batches of {micro or 1}; use a multiple of {world * (micro or 1)}"
        )
    return Cut(total, micro, accelerator.process_index, world)


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
        adversary = _half(judge, accelerator, optim, steps, lr=lr, betas=optim.adversary_betas)
        for parameter in adversary.parameters:
            parameter.requires_grad_(False)  # they are not the tokenizer's to move
    network = LossNetwork(training)
    rates = {"lr": optim.lr, "muon_lr": optim.muon_lr}
    main = _half(network, accelerator, optim, steps, **rates, betas=optim.betas)
    return Learner(
        accelerator=accelerator,
        main=main,
        adversary=adversary,
        weights=weights,
        cut=cut,
        seed=config.run.seed,
        max_grad_norm=optim.max_grad_norm,
    )


def _half(
    network: nn.Module,
    accelerator: Accelerator,
    optim: OptimSection,
    steps: int,
    *,
    lr: float,
    betas: tuple[float, float],
    muon_lr: float | None = None,
) -> Half:
    decay = optim.weight_decay
    parameters = [p for p in network.parameters() if p.requires_grad]
    matrices = [] if muon_lr is None else block_matrices(network)
    by_muon = {id(p) for p in matrices}
    groups = _groups([p for p in parameters if id(p) not in by_muon], decay)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas)
    if muon_lr is not None and matrices:
        optimizer = MuonAdamW(
            matrices, groups, lr=lr, muon_lr=muon_lr, betas=betas, weight_decay=decay
        )
    factor = LearningRate(optim.schedule, optim.warmup_steps, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return Half(network, parameters, optimizer, schedule).prepared(accelerator)


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, gains and single vectors do not."""
    parameters = list(parameters)
    decaying = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [(decaying, weight_decay), (others, 0.0)]
    return [{"params": chosen, "weight_decay": decay} for chosen, decay in groups if chosen]
