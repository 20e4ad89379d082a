"""What a run leaves behind is what diffusers loads, and draws what the trainer drew.

Kills, among others: a LoRA saved without its alpha (the images of scale 1 are tested to differ);
the averaged weights swapped back before they are saved; a model folder that needs flowrl to load;
a schedule that is not the scheduler's; a text length left at diffusers' default.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor

from flowrl.config import load_config
from flowrl.data.noise import sample_noise
from flowrl.data.sampler import eval_batch
from flowrl.train.card import usage, write_card
from flowrl.train.evaluate import Evaluator
from flowrl.train.loop import Trainer
from pipelines.sd3 import StableDiffusion3
from tests.artefacts.tiny_run import save_base, train, write_config

NUM_STEPS, TEXT_LENGTH = 4, 12
# Pixel values are in [0, 1], so an 8-bit step is 4e-3. Measured: 1.5e-6, from the order of float32
# sums (guidance is one batch here and two halves there).
MAX_DIFFERENCE = 2e-5


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    config = write_config(tmp_path_factory.mktemp("lora"), "lora")
    return train(config, "model.lora.rank=4", "model.lora.alpha=12")


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    config = write_config(tmp_path_factory.mktemp("full"), "full")
    return train(config, "optim.ema_decay=0.5", "optim.lr=0.003")


def drawn_by_trainer(run: Trainer, guidance_scale: float) -> tuple[list[str], Tensor, Tensor]:
    """(prompts, starting latents, images) of the exported weights."""
    evaluator: Evaluator = run.evaluator
    batch = eval_batch(evaluator.prompts, samples_per_prompt=1, seed=7, rank=0, world_size=1)
    shape = run.policy.pipeline.latent_shape
    latents = sample_noise(batch.seed, batch.sample_id, shape, stream=0)
    with run.policy.weights.use(evaluator.weights):
        rollout = run.policy.sample(batch, num_steps=NUM_STEPS, guidance_scale=guidance_scale)
    return [prompt.text for prompt in batch.prompts], latents, rollout.images


def drawn_by_diffusers(
    pipe: StableDiffusion3Pipeline, prompts: list[str], latents: Tensor, guidance_scale: float
) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompts,
        latents=latents,
        num_inference_steps=NUM_STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXT_LENGTH,
        output_type="pt",
    ).images


def difference(one: Tensor, two: Tensor) -> float:
    assert one.shape == two.shape
    return float((one - two).abs().max())


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_lora_file_draws_what_the_trainer_drew(lora_run: Trainer, guidance_scale: float) -> None:
    prompts, latents, images = drawn_by_trainer(lora_run, guidance_scale)
    pipe = StableDiffusion3Pipeline.from_pretrained(lora_run.config.model.id)
    base = drawn_by_diffusers(pipe, prompts, latents, guidance_scale)
    pipe.load_lora_weights(lora_run.run_folder / "final")
    tuned = drawn_by_diffusers(pipe, prompts, latents, guidance_scale)
    assert difference(tuned, images) < MAX_DIFFERENCE
    # The run moved the model, and it is the adapter with alpha / rank = 3 that was compared.
    pipe.set_adapters(pipe.get_active_adapters(), adapter_weights=1 / 3)
    unscaled = drawn_by_diffusers(pipe, prompts, latents, guidance_scale)
    assert difference(unscaled, images) > 100 * MAX_DIFFERENCE
    assert difference(base, images) > 100 * MAX_DIFFERENCE


def test_lora_folder_holds_the_adapter_alone(lora_run: Trainer) -> None:
    final = lora_run.run_folder / "final"
    assert {path.name for path in final.iterdir()} == {
        "pytorch_lora_weights.safetensors", "README.md", "images",
    }  # fmt: skip
    assert (final / "pytorch_lora_weights.safetensors").stat().st_size < 1e6


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_model_folder_draws_what_the_trainer_drew(full_run: Trainer, guidance_scale: float) -> None:
    prompts, latents, images = drawn_by_trainer(full_run, guidance_scale)
    pipe = StableDiffusion3Pipeline.from_pretrained(full_run.run_folder / "final" / "pipeline")
    tuned = drawn_by_diffusers(pipe, prompts, latents, guidance_scale)
    assert difference(tuned, images) < MAX_DIFFERENCE
    base = StableDiffusion3Pipeline.from_pretrained(full_run.config.model.id)
    untuned = drawn_by_diffusers(base, prompts, latents, guidance_scale)
    assert difference(untuned, images) > 100 * MAX_DIFFERENCE


def test_model_folder_holds_the_averaged_weights(full_run: Trainer) -> None:
    folder = full_run.run_folder / "final" / "pipeline"
    saved = StableDiffusion3Pipeline.from_pretrained(folder).transformer.state_dict()
    weights = full_run.policy.weights
    current = {name: value.clone() for name, value in weights.network.state_dict().items()}
    with weights.use("ema"):
        assert all(torch.equal(saved[name], v) for name, v in weights.network.state_dict().items())
    assert any(not torch.equal(saved[name], value) for name, value in current.items())


WITHOUT_FLOWRL = """
import sys
for name in ("flowrl", "pipelines", "rewards", "tokenizers_vis"):
    sys.modules[name] = None  # importing it fails, also where it is installed
import torch
from diffusers import StableDiffusion3Pipeline

given = torch.load("given.pt")
pipe = StableDiffusion3Pipeline.from_pretrained(given.pop("folder"))
torch.save(pipe(**given, output_type="pt").images, "images.pt")
"""


def test_model_folder_needs_no_flowrl(full_run: Trainer, tmp_path: Path) -> None:
    prompts, latents, images = drawn_by_trainer(full_run, 1.0)
    given = {
        "folder": str(full_run.run_folder / "final" / "pipeline"),
        "prompt": prompts,
        "latents": latents,
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": 1.0,
        "max_sequence_length": TEXT_LENGTH,
    }
    torch.save(given, tmp_path / "given.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", WITHOUT_FLOWRL],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=300,
    )
    assert difference(torch.load(tmp_path / "images.pt"), images) < MAX_DIFFERENCE


# --------------------------------------------------------------------------- sigmas


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_base(tmp_path_factory.mktemp("base")))


@pytest.mark.parametrize("num_steps", [1, 2, 10, 28])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_sigmas_are_those_of_the_scheduler(base: str, num_steps: int, shift: float | None) -> None:
    pipeline = StableDiffusion3(base, shift=shift)
    scheduler = StableDiffusion3Pipeline.from_pretrained(base).scheduler
    if shift is not None:
        scheduler = scheduler.from_config(scheduler.config, shift=shift)
    scheduler.set_timesteps(num_steps)
    assert torch.equal(pipeline.sigmas(num_steps), scheduler.sigmas)
    assert torch.equal(1000 * pipeline.sigmas(num_steps)[:-1], scheduler.timesteps)


def test_linear_sigmas_are_those_of_the_card(base: str, tmp_path: Path) -> None:
    config = load_config(
        write_config(tmp_path, "full"),
        ["model.args={schedule: linear, shift: 3.0}", "eval.num_steps=5"],
    )
    text = usage(config, prompt="a red square")
    [line] = [line.strip() for line in text.splitlines() if "sigmas=" in line]
    sigmas = eval(line.removeprefix("sigmas=").removesuffix(","), {"torch": torch})
    scheduler = StableDiffusion3Pipeline.from_pretrained(base).scheduler
    assert "from_config(pipe.scheduler.config, shift=3, use_dynamic_shifting=False)" in text
    scheduler = scheduler.from_config(scheduler.config, shift=3.0)
    scheduler.set_timesteps(sigmas=sigmas)
    ours = StableDiffusion3(base, schedule="linear", shift=3.0).sigmas(5)
    # 2e-7: the scheduler computes in float64 until the end.
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=0, atol=2e-7)


# --------------------------------------------------------------------------- the card


def code_of(card: str, language: str) -> str:
    return card.partition(f"```{language}\n")[2].partition("```")[0]


@pytest.mark.parametrize("kind", ["lora_run", "full_run"])
def test_code_of_the_card_draws_an_image(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Trainer = request.getfixturevalue(kind)
    final = run.run_folder / "final"
    monkeypatch.chdir(final)
    code = code_of((final / "README.md").read_text(), "python")
    assert "num_inference_steps=4" in code and "max_sequence_length=12" in code
    exec(compile(code, "README.md", "exec"), {})
    with Image.open(final / "image.png") as image:
        assert image.size == (64, 64)
    (final / "image.png").unlink()


def test_card_says_what_was_run_and_what_came_of_it(lora_run: Trainer, tmp_path: Path) -> None:
    final = lora_run.run_folder / "final"
    card = ModelCard.load(final / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert {"flowrl", "mix_grpo", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None and card.data.license is None  # not on the Hub; not known
    before, after = (
        json.loads((lora_run.run_folder / f"eval/step_00000{step}.json").read_text())
        for step in (0, 2)
    )
    assert before["score"] != after["score"]
    assert f"| score | {before['score']:.3f} | {after['score']:.3f} |" in card.text
    assert f"| diversity | {before['diversity']:.3f} | {after['diversity']:.3f} |" in card.text
    for row in ("kernel | flow_sde(noise_level=0.7)", "LoRA | rank 4, alpha 12", "0.02, constant"):
        assert row in card.text
    shown = [line.split('"')[1] for line in card.text.split("<img ")[1:]]
    assert len(shown) == 8 and all((final / name).is_file() for name in shown)
    copied = tmp_path / "config.yaml"
    copied.write_text(code_of(card.text, "yaml"))
    assert load_config(copied) == lora_run.config


def test_card_names_its_base_only_where_the_hub_knows_it(tmp_path: Path, full_run: Trainer) -> None:
    for number, (tuning, model, base, relation) in enumerate([
        ("lora", "stabilityai/stable-diffusion-3.5-medium", True, "adapter"),
        ("full", "stabilityai/stable-diffusion-3.5-medium", True, "finetune"),
        ("full", "shapes", False, None),
    ]):  # fmt: skip
        config = load_config(write_config(tmp_path, tuning), [f"model.id={model}"])
        path = write_card(tmp_path / str(number), config, full_run.method, step=3)
        data = ModelCard.load(path).data
        assert data.base_model == (model if base else None)
        assert data.get("base_model_relation") == relation
    assert "The run was not evaluated." in path.read_text()


def test_card_of_the_embedded_model_finds_its_folder(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, "lora"), ["model.id=shapes"])
    code = usage(config, prompt='a "red" square')
    compile(code, "README.md", "exec")
    assert 'resolve_model("shapes"), dtype=torch.float32' in code


def test_card_leaves_out_evaluations_of_an_abandoned_continuation(
    lora_run: Trainer, tmp_path: Path
) -> None:
    (tmp_path / "eval").mkdir()
    data = json.loads((lora_run.run_folder / "eval/step_000000.json").read_text())
    for step in (0, 5):
        text = json.dumps(data | {"step": step, "samples": []})
        (tmp_path / f"eval/step_{step:06d}.json").write_text(text)
    card = write_card(tmp_path, lora_run.config, lora_run.method, step=3).read_text()
    assert "after, step 0" in card and "step 5" not in card
