"""Pretrained generators as plain callables: encode, sigmas, velocity or logits, decode, save.

A pipeline never imports flowrl or rewards; it conforms to `flowrl.protocols` by its shape, and
`flowrl.testing.check_pipeline` says whether it does. `PIPELINES` maps a config's `model.pipeline`
to "module:Class"; `EMBEDDED` names the models that live in this package.
"""

from dataclasses import dataclass
from pathlib import Path

PIPELINES = {
    "sd3": "pipelines.sd3:StableDiffusion3",
    "flux": "pipelines.flux:Flux",
    "ar": "pipelines.ar.pipeline:Autoregressive",
}


@dataclass(frozen=True)
class Embedded:
    """A model that lives in this package, and how it was trained to be used.

    Attributes:
        folder: in diffusers' format.
        pipeline: its adapter, a name of `PIPELINES`.
        height, width: of its images, pixels.
        max_sequence_length: tokens to which its T5 text is padded.
        num_steps, guidance_scale: of its sampler.
    """

    folder: Path
    pipeline: str
    height: int
    width: int
    max_sequence_length: int
    num_steps: int
    guidance_scale: float


_WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED = {
    "shapes": Embedded(
        folder=_WEIGHTS / "shapes_sd3",
        pipeline="sd3",
        height=64,
        width=64,
        max_sequence_length=12,
        num_steps=20,
        guidance_scale=1.0,
    )
}
