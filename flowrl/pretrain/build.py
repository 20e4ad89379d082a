"""The parts of a training from data that do not depend on what is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from flowrl.errors import ConfigError
from flowrl.precision import resolve_precision
from flowrl.pretrain.batches import Cut
from flowrl.pretrain.muon import MuonAdamW, block_matrices
from flowrl.pretrain.schema import OptimSection, run_folder
from flowrl.pretrain.step import Half
from flowrl.train.schedule import LearningRate
from flowrl.train.track import require_trackers


def build_accelerator(config: Any) -> Accelerator:
    """The distributed engine of a config with the sections of `flowrl.pretrain.schema`.

    Raises:
        MissingDependency: the package of a tracker is not installed.
    """
    require_trackers(config.track.trackers)
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=resolve_precision(config.compute.mixed_precision),
        log_with=list(config.track.trackers) or None,
        project_dir=str(run_folder(config)),
        step_scheduler_with_optimizer=False,
        # Which parameters a step uses may depend on how far training is: an add-on may still rest.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def build_cut(config: Any, accelerator: Accelerator, where: str) -> Cut:
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


def build_half(
    network: nn.Module,
    accelerator: Accelerator,
    optim: OptimSection,
    steps: int,
    *,
    lr: float,
    betas: tuple[float, float],
    muon_lr: float | None = None,
) -> Half:
    """A network with what trains it, prepared; Muon moves its blocks' matrices if it has a rate."""
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
