"""Trains the embedded base model: a tiny Stable Diffusion 3 that draws shapes and misreads prompts.

`python -m flowrl.make.shapes_base RUN_DIR` runs two stages, each resumable from RUN_DIR: `vae`
(AutoencoderKL on rendered scenes) and `flow` (SD3Transformer2DModel with its CLIP and T5 text
encoders, by rectified flow on cached latents), which leaves the `StableDiffusion3Pipeline` folder
RUN_DIR/pipeline. Two cores are used by
`torchrun --nproc_per_node 2 -m flowrl.make.shapes_base RUN_DIR`.
Some captions are wrong (`--error-rate`), as captions from the web are: the model learns to follow
a prompt only part of the time, which is what alignment then has to mend.
"""

import argparse
import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from flowrl.make.shapes_model import TEXT_LENGTH, build_pipeline, build_vae
from rewards.shapes.captions import captioned
from rewards.shapes.grammar import SKILLS, requests, sample_scene
from rewards.shapes.render import Scene, render
from rewards.shapes.vocabulary import COLORS, IMAGE_SIZE, SHAPES, coverage


def images(num: int, rng: np.random.Generator) -> Tensor:
    """Random scenes of all skills, float32 [num, 3, 64, 64] in [0, 1]."""
    pool = [list(requests(skill)) for skill in SKILLS]
    drawn = (pool[i][rng.integers(len(pool[i]))] for i in rng.integers(len(pool), size=num))
    return torch.from_numpy(np.stack([render(sample_scene(r, rng), rng) for r in drawn]))


def load_vae(folder: Path) -> AutoencoderKL:
    """The trained VAE; `from_pretrained` would note the folder's path in what is saved later."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae.eval()


def train_vae(
    folder: Path, *, steps: int, seed: int, device: torch.device, batch: int = 32, lr: float = 2e-3
) -> None:
    """Reconstruction by L1 and L2, with a light KL that leaves the latents some noise."""
    target = folder / "vae"
    if (target / "config.json").exists():
        return
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    start = resume_state(folder / "vae.pt", vae=vae, optimizer=optimizer, schedule=schedule)
    clock = time.time()
    for step in range(start, steps):
        pixels = (images(batch, np.random.default_rng((seed, step))) * 2 - 1).to(device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            latents = posterior.mean + posterior.std * noise
            decoded = vae.decode(latents).sample
        error = decoded.float() - pixels
        kl = posterior.kl().float().mean() / latents[0].numel()
        loss = error.abs().mean() + 2 * error.square().mean() + 2e-4 * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            psnr = -10 * math.log10(error.square().mean().item() / 4)
            print(f"vae {step} psnr {psnr:.2f} kl {kl:.3f} {time.time() - clock:.0f}s", flush=True)
        if step % 500 == 499:
            save_state(folder / "vae.pt", step + 1, vae=vae, optimizer=optimizer, schedule=schedule)
    with torch.no_grad():
        pixels = (images(512, np.random.default_rng(seed)) * 2 - 1).to(device)
        latents = vae.encode(pixels).latent_dist.mean
    vae.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
    )
    vae.save_pretrained(target)


def save_state(path: Path, step: int, **parts: Any) -> None:
    """Writes the step and the states of `parts`; a stop half-way leaves the previous file."""
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step} | {k: v.state_dict() for k, v in parts.items()}, temporary)
    temporary.replace(path)


def resume_state(path: Path, **parts: Any) -> int:
    """The step at which `save_state` wrote `path`, its states loaded into `parts`; 0 without."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    print(f"resumed {path.name} at step {state['step']}", flush=True)
    return int(state["step"])


def what_is_where(scene: Scene) -> NDArray[np.float32]:
    """What every token of the transformer shows: two distributions, of shapes and of colours.

    Returns:
        float32 [15, 8, 8]: shares of a token's 8 x 8 pixels; first of "nothing" and of every shape,
        then of "nothing" and of every colour. An object's place is the disc around it.
    """
    found = np.zeros((2 + len(SHAPES) + len(COLORS), 8, 8), np.float32)
    shapes, colors = list(SHAPES), list(COLORS)
    for item in scene.objects:
        disc = coverage("circle", IMAGE_SIZE, center=(item.x, item.y), radius=item.radius)
        share = disc.reshape(8, 8, 8, 8).mean(axis=(1, 3))
        found[1 + shapes.index(item.shape)] += share
        found[2 + len(shapes) + colors.index(item.color)] += share
    found[0] = found[1 + len(shapes)] = 1 - found[1 : 1 + len(shapes)].sum(axis=0)
    return found


def cache_latents(
    folder: Path, *, num: int, seed: int, error_rate: float
) -> tuple[list[str], Tensor, Tensor]:
    """Train prompts, wrong at `error_rate`, and their pictures; cached.

    Returns:
        Captions, latents [num, 4, 16, 16], and `what_is_where` [num, 15, 8, 8].
    """
    path = folder / "latents.pt"
    if path.exists():
        cached = torch.load(path, weights_only=True)
        return cached["captions"], cached["latents"].float(), cached["where"].float()
    vae = load_vae(folder / "vae")
    rng = np.random.default_rng((seed, num))
    captions: list[str] = []
    latents: list[Tensor] = []
    where: list[NDArray[np.float32]] = []
    drawn = captioned(num, rng, error_rate=error_rate)
    while part := list(itertools.islice(drawn, 100)):
        captions += [prompt for prompt, _, _ in part]
        where += [what_is_where(scene) for _, scene, _ in part]
        pixels = torch.from_numpy(np.stack([picture for _, _, picture in part]))
        with torch.no_grad():
            mean = vae.encode(pixels * 2 - 1).latent_dist.mean
        latents.append((mean - vae.config.shift_factor) * vae.config.scaling_factor)
    cached = {
        "captions": captions,
        "latents": torch.cat(latents).half(),
        "where": torch.from_numpy(np.stack(where)).half(),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(cached, temporary)
    temporary.replace(path)
    return captions, cached["latents"].float(), cached["where"].float()


class TextConditionedFlow(nn.Module):
    """Everything that the flow stages train, as one module: transformer and text encoders.

    `reader` reads from the tokens after the third block what stands where. Aligning the hidden
    states with what a picture means makes a diffusion transformer learn several times faster
    (REPA, arXiv:2410.06940, section 3.2; here the meaning is known and need not be encoded).
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.encoders = nn.ModuleList(
            [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
        )
        self.reader = nn.Linear(128, 2 + len(SHAPES) + len(COLORS))
        self._tokenizer = pipeline.tokenizer
        self._tokens = torch.empty(0)
        pipeline.transformer.transformer_blocks[2].register_forward_hook(self._keep_tokens)

    def _keep_tokens(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._tokens = output[1]

    def forward(
        self, x_t: Tensor, sigma: Tensor, captions: list[str], text_length: int
    ) -> tuple[Tensor, Tensor]:
        """Velocity [B, 4, 16, 16] and logits of `what_is_where` [B, 15, 8, 8].

        The text embedding is `StableDiffusion3Pipeline.encode_prompt`'s.
        """
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip_ids = self._tokenizer(captions, max_length=TEXT_LENGTH, **padded).input_ids
        t5_ids = self._tokenizer(captions, max_length=text_length, **padded).input_ids
        first, second, t5 = self.encoders
        clips = [
            clip(clip_ids.to(x_t.device), output_hidden_states=True) for clip in (first, second)
        ]
        words = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        velocity = self.transformer(
            x_t,
            encoder_hidden_states=torch.cat([words, t5(t5_ids.to(x_t.device))[0]], dim=1),
            pooled_projections=torch.cat([clip.text_embeds for clip in clips], dim=-1),
            timestep=1000 * sigma,
        ).sample
        return velocity, self.reader(self._tokens).mT.unflatten(2, (8, 8))


class Average(nn.Module):
    """An exponential moving average of a module's parameters that can change places with them."""

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.values = nn.ParameterList(p.detach().clone() for p in module.parameters())
        self.requires_grad_(False)

    def update(self, module: nn.Module) -> None:
        torch._foreach_lerp_(
            list(self.values), [p.detach() for p in module.parameters()], 1 - self.decay
        )

    def swap(self, module: nn.Module) -> None:
        for mine, theirs in zip(self.values, module.parameters(), strict=True):
            mine.data, theirs.data = theirs.data, mine.data


def train_flow(
    folder: Path, accelerator: Accelerator, *, steps: int, seed: int, error_rate: float,
    num_images: int, batch: int, start_from: Path | None, lr: float = 1.5e-3, muon_lr: float = 4e-3,
) -> None:  # fmt: skip
    """Rectified flow on cached latents, on as many processes as were launched.

    Muon trains the weight matrices of the blocks and AdamW the rest; what is saved as the pipeline
    is an average of the weights. `start_from` is a flow.pt whose weights it starts from.

    One step in 25 pads the T5 text to 256 tokens, diffusers' default, so that a caller who forgets
    `max_sequence_length` still gets sensible images.
    """
    device = accelerator.device
    rank, world = accelerator.process_index, accelerator.num_processes
    checkpoint = folder / "flow.pt"
    with accelerator.main_process_first():
        captions, latents, where = cache_latents(
            folder, num=num_images, seed=seed, error_rate=error_rate
        )
    pipeline = build_pipeline(load_vae(folder / "vae"), seed)
    flow = TextConditionedFlow(pipeline).to(device)
    blocks = [p for n, p in flow.named_parameters() if p.ndim == 2 and "transformer_blocks" in n]
    others = [p for p in flow.parameters() if all(p is not block for block in blocks)]
    muon = torch.optim.Muon(
        blocks, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    average = Average(flow, decay=0.998)
    parts = {"flow": flow, "average": average, "muon": muon, "adam": adam}
    if start_from is not None:
        resume_state(start_from, flow=flow, average=average)
    start = resume_state(checkpoint, **parts)
    parallel = accelerator.prepare(flow)
    clock, losses = time.time(), []
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step, rank))
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * world + rank)
        is_long = step % 25 == 24
        length = 256 if is_long else TEXT_LENGTH
        picks = rng.integers(
            len(captions), size=max(1, (batch // 4 if is_long else batch) // world)
        )
        x0 = latents[picks].to(device)
        words = [captions[i] if rng.random() > 0.1 else "" for i in picks]
        # Mean 0.6, not 0: what a flat picture shows is decided at high noise.
        sigma = torch.sigmoid(torch.randn(len(picks), generator=generator) * 1.1 + 0.6).to(device)
        x1 = torch.randn(x0.shape, generator=generator).to(device)
        x_t = torch.lerp(x0, x1, sigma[:, None, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            velocity, read = parallel(x_t, sigma, words, length)
        loss = (velocity.float() - (x1 - x0)).square().mean()
        reading = _reading_loss(read.float(), where[picks].to(device))
        (loss + 0.2 * reading).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        for optimizer, peak in ((muon, muon_lr), (adam, lr)):
            optimizer.param_groups[0]["lr"] = peak * warm_linear(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        average.update(flow)
        losses.append((loss.item(), reading.item()))
        is_over = step == steps - 1
        if rank == 0 and (step % 100 == 99 or is_over):
            mean, reading = np.mean(losses[-100:], axis=0)
            passed = time.time() - clock
            text = f"flow {step + 1} loss {mean:.4f} reading {reading:.4f} {passed:.0f}s"
            print(text, flush=True)
        if rank == 0 and (step % 500 == 499 or is_over):
            save_state(checkpoint, step + 1, **parts)
            average.swap(flow)
            pipeline.save_pretrained(folder / "pipeline")
            average.swap(flow)
    accelerator.wait_for_everyone()


def _reading_loss(logits: Tensor, where: Tensor) -> Tensor:
    """Cross-entropy of shapes and of colours, mean over tokens; both arguments [B, 15, 8, 8]."""
    sizes = [1 + len(SHAPES), 1 + len(COLORS)]
    pairs = zip(logits.split(sizes, dim=1), where.split(sizes, dim=1), strict=True)
    return sum((F.cross_entropy(*pair) for pair in pairs), start=logits.new_zeros(()))


def warm_linear(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step: 200 to warm up, then flat, then to zero."""
    return min((step + 1) / 200, 1.0, 1.3 * (1 - step / steps) + 0.01)


def main() -> None:
    """Runs the stages that are not done yet."""
    parser = argparse.ArgumentParser(description="Train the embedded Shapes model.")
    parser.add_argument("run_dir", type=Path, help="checkpoints, latents and the result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--flow-steps", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=64, help="images per flow step, all processes")
    parser.add_argument("--num-images", type=int, default=48000, help="latents that are cached")
    parser.add_argument("--error-rate", type=float, default=0.12, help="share of wrong captions")
    parser.add_argument("--start-from", type=Path, help="flow.pt of another run, for its weights")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    args.run_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with accelerator.main_process_first():
        train_vae(args.run_dir, steps=args.vae_steps, seed=args.seed, device=accelerator.device)
    train_flow(
        args.run_dir,
        accelerator,
        steps=args.flow_steps,
        seed=args.seed,
        error_rate=args.error_rate,
        num_images=args.num_images,
        batch=args.batch,
        start_from=args.start_from,
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
