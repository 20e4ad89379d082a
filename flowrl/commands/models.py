"""What MODEL means on the command line, and a policy that samples it as the trainer would.

Reading order: `Model`, `find_model` (an embedded name, a run's folder or its best/, a diffusers
folder or a Hub id; whatever was given by an option goes before what the model says), `open_policy`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flowrl.config import Config, load_config
from flowrl.errors import ConfigError
from flowrl.policies.flow import FlowPolicy
from flowrl.policies.token import Sampling, TokenPolicy
from flowrl.policies.weights import FrozenWeights
from flowrl.precision import resolve_precision
from flowrl.sources import build_pipeline, embedded_model, loading, require_ours
from flowrl.train.monitor import BEST, read_note

_LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Model:
    """A model and how it is sampled.

    The defaults are those of diffusers' `StableDiffusion3Pipeline`.

    Attributes:
        id: an embedded name, a diffusers folder or a Hub id: the base where there is a LoRA.
        where: who says so, for error messages.
        lora: its folder or file, or None.
        height, width: pixels; None = the model's own.
        sampling: of a token model, `policies.token.Sampling` but for the guidance.
        config: of the run whose artefact this is, or None.
        step: training steps done; 0 where there is no run.
    """

    id: str
    where: str
    pipeline: str = "sd3"
    lora: Path | None = None
    revision: str | None = None
    height: int | None = None
    width: int | None = None
    max_sequence_length: int = 256
    dtype: str = "float32"
    mixed_precision: str = "no"
    args: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int = 28
    guidance_scale: float = 7.0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    rollout_batch_size: int = 32
    decode_batch_size: int = 32
    config: Config | None = None
    step: int = 0

    def describe(self) -> str:
        """How it is sampled, in a line."""
        size = f", {self.width} x {self.height} pixels" if self.width and self.height else ""
        lora = f" with {self.lora}" if self.lora else ""
        if not self.num_steps:
            return f"{self.id}: token by token, guidance {self.guidance_scale:g}{size}"
        return (
            f"{self.id}{lora}: {self.num_steps} steps, guidance {self.guidance_scale:g}, "
            f"text length {self.max_sequence_length}{size}"
        )


def find_model(name: str, given: Mapping[str, Any], *, command: str) -> Model:
    """What MODEL stands for.

    Args:
        name: as typed.
        given: fields of `Model` by option; None = the model's own.
        command: e.g. "flowrl sample", for error messages.

    Raises:
        ConfigError: a run without an artefact, or a second LoRA.
    """
    require_ours("rewards", "pipelines")
    folder = Path(name)
    if embedded := embedded_model(name):
        model = Model(
            id=name,
            where=command,
            pipeline=embedded.pipeline,
            height=embedded.height,
            width=embedded.width,
            max_sequence_length=embedded.max_sequence_length,
            num_steps=embedded.num_steps,
            guidance_scale=embedded.guidance_scale,
        )
    elif (folder / "config.yaml").is_file():
        model = _of_run(folder, "final")
    elif folder.name in ("final", BEST) and (folder.parent / "config.yaml").is_file():
        model = _of_run(folder.parent, folder.name)
    elif (folder / "config.json").is_file() and (folder / "text_tokenizer").is_dir():
        model = Model(id=name, where=command, pipeline="ar", num_steps=0, guidance_scale=1.0)
    elif _pipeline_class(name) == "FluxPipeline":
        model = Model(
            id=name, where=command, pipeline="flux", max_sequence_length=512, guidance_scale=3.5
        )
    else:
        model = Model(id=name, where=command)
    if model.lora and given.get("lora"):
        raise ConfigError(f"{name} is a LoRA already; give its base model, {model.id}, and --lora")
    return replace(model, **{key: value for key, value in given.items() if value is not None})


def open_policy(
    model: Model, prompts: Sequence[str], accelerator: Accelerator
) -> FlowPolicy | TokenPolicy:
    """The policy that samples `model`, for these prompts alone.

    Raises:
        ConfigError: the model or its LoRA cannot be loaded, or does not fit.
    """
    pipeline = build_pipeline(model, model.where, accelerator.device)
    if model.lora is not None:
        with loading(f"{model.where}: the LoRA"):
            pipeline.load_lora(model.lora)
    weights = FrozenWeights(accelerator.prepare_model(pipeline.network, evaluation_mode=True))
    sizes: dict[str, Any] = {
        "rollout_batch_size": model.rollout_batch_size,
        "decode_batch_size": model.decode_batch_size,
        "device": accelerator.device,
    }
    scale = model.guidance_scale
    policy: FlowPolicy | TokenPolicy
    if hasattr(pipeline, "logits"):
        sampling = Sampling(guidance_scale=scale, **model.sampling)
        policy = TokenPolicy(pipeline, weights, sampling=sampling, **sizes)
    else:
        policy = FlowPolicy(pipeline, weights, guidance_scale=scale, **sizes)
    policy.precompute(prompts, None)
    return policy


def make_folder(path: Path) -> Path:
    """The folder of `--out`, made if need be.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"--out {path} cannot be made ({reason}); choose another") from error
    return path


def _pipeline_class(name: str) -> str:
    """The pipeline that a diffusers folder or a Hub id was saved from; empty if nothing says it.

    What is wrong with it is said when it is loaded.
    """
    from huggingface_hub import hf_hub_download

    file = Path(name) / "model_index.json"
    try:
        if not Path(name).is_dir() and name.count("/") == 1 and name[0] not in "./~":
            file = Path(hf_hub_download(name, file.name))
        return str(json.loads(file.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError):
        return ""


def _of_run(run: Path, part: str) -> Model:
    """The artefact of a run, of its end or its best evaluation, sampled as the run evaluated it."""
    config = load_config(run / "config.yaml")
    section, guidance = config.model, config.eval.guidance_scale
    is_lora = section.tuning == "lora"
    artefact = run / part / (_LORA if is_lora else "pipeline")
    if not artefact.exists():
        when = "it is written at the end of training: go on with run.resume=latest"
        if part == BEST:
            when = "it is kept where monitor.reward is set and once rose above the base model's"
        raise ConfigError(f"{run} has no {artefact.relative_to(run)}{_state(run)}; {when}")
    state = _status(run) if part == "final" else read_note(run)
    return Model(
        id=section.id if is_lora else str(artefact),
        where=str(run / "config.yaml") if is_lora else str(run),
        pipeline=section.pipeline,
        lora=artefact if is_lora else None,
        revision=section.revision if is_lora else None,
        height=section.height,
        width=section.width,
        max_sequence_length=section.max_sequence_length,
        dtype=section.dtype,
        mixed_precision=resolve_precision(config.compute.mixed_precision),
        args=section.args,
        num_steps=config.eval.num_steps or 0,
        sampling=dict(section.sampling),
        guidance_scale=section.guidance_scale if guidance is None else guidance,
        rollout_batch_size=config.compute.rollout_batch_size,
        decode_batch_size=config.compute.decode_batch_size,
        config=config,
        step=int(state.get("step", 0)),
    )


def _state(run: Path) -> str:
    """How the run stands, for a message; empty where it does not say."""
    status = _status(run)
    return f" (the run is {status['state']} at step {status['step']})" if status else ""


def _status(run: Path) -> dict[str, Any]:
    file = run / "status.json"
    if not file.is_file():
        return {}
    try:
        status = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); delete it") from error
    return dict(status)
