"""FLUX draws what diffusers' own `FluxPipeline` draws, before training and from what a run leaves.

Random weights in the true format. Kills, among others: latents packed in another order, or with
height and width exchanged (images are not square); guidance that is fed as classifier-free, not at
all, or times 1000 too often; a shift that does not follow the image's size, or is applied twice;
text positions that are counted; a LoRA that misses the single blocks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from flowrl.build import build_parts
from flowrl.config import load_config
from flowrl.data.noise import sample_noise
from flowrl.data.sampler import eval_batch
from flowrl.errors import ConfigError
from flowrl.policies.flow import FlowPolicy
from flowrl.policies.weights import FrozenWeights
from flowrl.train.loop import Trainer
from flowrl.types import Prompt, PromptBatch
from pipelines.flux import Flux
from tests.artefacts.flux_folder import tiny_transformer, write_flux
from tests.artefacts.tiny_run import save_base, train, write_config

NUM_STEPS, TEXT_LENGTH, HEIGHT, WIDTH = 4, 8, 32, 48
# As in test_artefacts: pixel values are in [0, 1]. Measured: 0 for the base model.
MAX_DIFFERENCE = 2e-5
PROMPTS = ("a red square", "two blue circles", "a green triangle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "model", tiny_transformer())


def flux(folder: Path, **changes: object) -> Flux:
    size = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": TEXT_LENGTH}
    return Flux(str(folder), **(size | changes))  # type: ignore[arg-type]


def settings(folder: Path) -> list[str]:
    return [
        "model.pipeline=flux", f"model.id={folder}", f"model.height={HEIGHT}",
        f"model.width={WIDTH}", f"model.max_sequence_length={TEXT_LENGTH}",
        "model.guidance_scale=3.5", "data.group_size=3",
    ]  # fmt: skip


def batch_of(prompts: tuple[str, ...] = PROMPTS) -> PromptBatch:
    each = tuple(Prompt(text) for text in prompts)
    return eval_batch(each, samples_per_prompt=1, seed=7, rank=0, world_size=1)


def drawn_by_us(policy: FlowPolicy, guidance_scale: float) -> Tensor:
    rollout = policy.sample(batch_of(), num_steps=NUM_STEPS, guidance_scale=guidance_scale)
    assert rollout.network_evals == len(PROMPTS) * NUM_STEPS  # one forward per step
    assert rollout.images.shape == (len(PROMPTS), 3, HEIGHT, WIDTH)
    return rollout.images


def drawn_by_diffusers(pipe: FluxPipeline, guidance_scale: float) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    height, width = HEIGHT // 4, WIDTH // 4
    noise = sample_noise(batch_of().seed, batch_of().sample_id, (4, height, width), stream=0)
    return pipe(
        list(PROMPTS),
        height=HEIGHT,
        width=WIDTH,
        latents=FluxPipeline._pack_latents(noise, len(PROMPTS), 4, height, width),
        num_inference_steps=NUM_STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXT_LENGTH,
        output_type="pt",
    ).images


def difference(one: Tensor, two: Tensor) -> float:
    assert one.shape == two.shape
    return float((one - two).abs().max())


# --------------------------------------------------------------------------- the base model


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_same_noise_gives_the_image_of_diffusers(folder: Path, guidance_scale: float) -> None:
    pipeline = flux(folder)
    policy = FlowPolicy(pipeline, FrozenWeights(pipeline.network))
    policy.precompute(PROMPTS, None)
    theirs = FluxPipeline.from_pretrained(folder)
    images = drawn_by_us(policy, guidance_scale)
    assert difference(images, drawn_by_diffusers(theirs, guidance_scale)) < MAX_DIFFERENCE
    other = drawn_by_diffusers(theirs, guidance_scale + 2)
    assert difference(images, other) > 100 * MAX_DIFFERENCE


@pytest.mark.parametrize(("height", "width"), [(32, 48), (256, 384), (1024, 1024)])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_sigmas_are_those_of_the_pipeline(
    folder: Path, height: int, width: int, shift: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = FluxPipeline.from_pretrained(folder)
    if shift is not None:
        pipe.scheduler = pipe.scheduler.from_config(
            pipe.scheduler.config, shift=shift, use_dynamic_shifting=False
        )
    monkeypatch.setattr(pipe.transformer, "forward", lambda hidden_states, **_: (hidden_states,))
    pipe.set_progress_bar_config(disable=True)
    ours = flux(folder, height=height, width=width, shift=shift).sigmas(5)
    pipe("a", height=height, width=width, num_inference_steps=5, output_type="latent")
    assert torch.equal(ours, pipe.scheduler.sigmas)
    if shift is not None:  # once
        line = torch.linspace(1, 0, 6)
        torch.testing.assert_close(ours, 3 * line / (1 + 2 * line))


def test_sizes_and_models_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width=44 does not fit the model: use a multiple of 8"):
        flux(folder, width=44)
    with pytest.raises(ValueError, match="max_sequence_length=513 is beyond FLUX's 512"):
        flux(folder, max_sequence_length=513)
    with pytest.raises(ValueError, match=r"takes no guidance.* use FLUX\.1-dev"):
        flux(write_flux(tmp_path / "schnell", tiny_transformer(guidance_embeds=False)))
    with pytest.raises(ValueError, match="a StableDiffusion3Pipeline, and this adapter loads a Fl"):
        flux(save_base(tmp_path))
    (folder.parent / "broken").mkdir()
    with pytest.raises(FileNotFoundError, match=r"lacks model_index\.json, transformer"):
        flux(folder.parent / "broken")


# --------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def lora_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    config = write_config(tmp_path_factory.mktemp("lora"), "lora")
    return train(config, *settings(folder), "model.lora.rank=4", "model.lora.alpha=12")


def drawn_by_trainer(run: Trainer) -> Tensor:
    """By the exported weights; the prompts are encoded anew, for the run let its encoders go."""
    pipeline, weights = flux(Path(run.config.model.id)), run.policy.weights
    policy = FlowPolicy(pipeline, weights)
    policy.precompute(PROMPTS, None)
    with weights.use(run.evaluator.weights):
        return drawn_by_us(policy, 3.5)


def test_lora_file_draws_in_diffusers_what_the_trainer_drew(lora_run: Trainer) -> None:
    images = drawn_by_trainer(lora_run)
    pipe = FluxPipeline.from_pretrained(lora_run.config.model.id)
    base = drawn_by_diffusers(pipe, 3.5)
    pipe.load_lora_weights(lora_run.run_folder / "final")
    assert difference(drawn_by_diffusers(pipe, 3.5), images) < MAX_DIFFERENCE
    # The run moved the model, and it is the adapter with alpha / rank = 3 that was compared.
    pipe.set_adapters(pipe.get_active_adapters(), adapter_weights=1 / 3)
    assert difference(drawn_by_diffusers(pipe, 3.5), images) > 100 * MAX_DIFFERENCE
    assert difference(base, images) > 100 * MAX_DIFFERENCE
    reloaded = flux(Path(lora_run.config.model.id))
    reloaded.load_lora(lora_run.run_folder / "final")
    policy = FlowPolicy(reloaded, FrozenWeights(reloaded.network))
    policy.precompute(PROMPTS, None)
    assert difference(drawn_by_us(policy, 3.5), images) < MAX_DIFFERENCE


def test_the_ratio_is_one_and_the_gradient_reaches_every_adapter(lora_run: Trainer) -> None:
    policy, weights = lora_run.policy, lora_run.policy.weights
    batch = lora_run.sampler(1)
    rollout, trajectory = policy.rollout(batch, lora_run.method.plan(1))
    decisions = trajectory.decisions
    index = torch.arange(len(decisions.row))
    evaluation = policy.evaluate(trajectory, index)
    ratio = torch.exp(evaluation.log_prob - decisions.old_log_prob.to(evaluation.log_prob))
    assert float((ratio - 1).detach().abs().max()) < 1e-5
    evaluation.log_prob.sum().backward()
    network = lora_run.policy.pipeline.network
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    assert sum("transformer_blocks.0.attn.add_q_proj.lora_A" in name for name in names) == 1
    assert sum(name.startswith("single_transformer_blocks.1.attn.to_q") for name in names) == 2
    # 8 projections of each of 2 double blocks and 3 of each of 2 single ones, A and B.
    assert len(names) == 2 * (2 * 8 + 2 * 3) and all("lora_" in name for name in names)
    # The text leaves the last double block for the single ones, so no adapter is without use.
    assert all(bool(p.grad.abs().sum() > 0) for p in weights.trainable())
    # The window stands at step 1: the prefix is one state per group, and nothing counts twice.
    groups, samples = 2, 6
    assert rollout.network_evals == 2 * groups + 2 * samples


def test_model_folder_draws_in_diffusers_what_the_trainer_drew(
    folder: Path, tmp_path: Path
) -> None:
    run = train(write_config(tmp_path, "full"), *settings(folder), "optim.lr=0.003")
    images = drawn_by_trainer(run)
    pipe = FluxPipeline.from_pretrained(run.run_folder / "final" / "pipeline")
    assert difference(drawn_by_diffusers(pipe, 3.5), images) < MAX_DIFFERENCE
    base = drawn_by_diffusers(FluxPipeline.from_pretrained(folder), 3.5)
    assert difference(base, images) > 100 * MAX_DIFFERENCE


def test_a_forward_method_trains_at_the_embedded_guidance(folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, "lora", extra="method: null\n")
    method = ["method.name=dgpo", "method.args={num_steps: 3, num_draws: 1, group_size: 3}"]
    # Three samples stand in one chunk; with classifier-free guidance they would need six rows.
    small = [*settings(folder), *method, "compute.micro_batch_size=3"]
    trainer = train(config, *small)
    with pytest.raises(ConfigError, match=r"3 samples, guided.* use 6 or more"):
        build_parts(load_config(config, ["model.pipeline=sd3", *small[1:]]), "flux.yaml")
    policy, batch = trainer.policy, trainer.sampler(3)
    rollout, trajectory = policy.rollout(batch, trainer.method.plan(3))
    assert rollout.network_evals == 3 * len(batch)
    index = torch.arange(3)
    x0, x1, sigma = trajectory.points(index)
    sample = trajectory.decisions.sample[index]
    rows = policy.sampler._conditioning(batch, sample)[0] | {"guidance": torch.full((3,), 3.5)}
    x_t = x0 + sigma[:, None, None, None] * (x1 - x0)
    expected = policy.pipeline.velocity(policy.training_network, x_t, sigma, rows)
    torch.testing.assert_close(policy.evaluate(trajectory, index).velocity, expected)
