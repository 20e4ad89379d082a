"""The small evaluation of a running training: losses, PSNR and use of codes on held-out images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.data.seeds import derive_seed
from flowrl.tokenizer.images import as_pictures, to_float
from tokenizers_vis.tokenizer import VisualTokenizer
from tokenizers_vis.training import TokenizerTraining

_MOST_COUNTS = 6


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation found.

    Attributes:
        metrics: key -> value.
        images: [R, N, 3, H, W] in [0, 1] on the CPU: originals, then a row per number of tokens;
            of clips a few frames side by side.
        rows: what each row is.
    """

    metrics: dict[str, float]
    images: Tensor
    rows: tuple[str, ...]


@torch.no_grad()
def evaluate_held_out(
    training: TokenizerTraining,
    pixels: Tensor,
    *,
    batch_size: int,
    num_shown: int,
    seed: int,
    progress: float,
    device: torch.device,
) -> HeldOut:
    """Losses by name as in training (dropout included), and reconstructions for growing counts.

    Draws nothing from the global generator's course and leaves training mode as it was.

    Args:
        training: tokenizer and add-ons, with the weights that are to be measured.
        pixels: uint8 [N, *sample_shape].
        batch_size: images per forward.
        num_shown: images whose reconstructions are returned.
        seed: of what is drawn, the same every time.
        progress: of the training, in [0, 1].
        device: of the tokenizer.
    """
    was_training, state = training.training, torch.get_rng_state()
    training.eval()
    torch.manual_seed(derive_seed(seed, "library"))
    try:
        metrics = _losses(training, pixels, batch_size, seed, progress, device)
        tokenizer = training.tokenizer
        metrics |= _usage(tokenizer, pixels, batch_size, device)
        originals = to_float(pixels, torch.device("cpu"))
        rows, drawn = ["original"], [as_pictures(originals[:num_shown])]
        for count in shown_counts(tokenizer) if tokenizer.is_decodable else ():
            images = _reconstructed(tokenizer, pixels, count, batch_size, seed, device)
            ratio = float(psnr(images, originals).mean())
            if len(tokenizer.token_counts) > 1:
                metrics[f"eval/psnr/{count}"] = ratio
            if count == tokenizer.token_counts[-1]:
                metrics["eval/psnr"] = ratio
            rows.append(f"{count} tokens")
            drawn.append(as_pictures(images[:num_shown]))
    finally:
        training.train(was_training)
        torch.set_rng_state(state)
    return HeldOut(metrics, torch.stack(drawn), tuple(rows))


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] of images [B, ...] in [0, 1], dB; at most 100."""
    error = (images - originals).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))


def shown_counts(tokenizer: VisualTokenizer) -> tuple[int, ...]:
    """Up to six of the numbers of tokens that it can keep: powers of two, and all."""
    counts = tokenizer.token_counts
    powers = [count for count in counts if count & (count - 1) == 0]
    chosen = sorted({*(powers or counts), counts[-1]})
    if len(chosen) > _MOST_COUNTS:
        at = torch.linspace(0, len(chosen) - 1, _MOST_COUNTS).round().long()
        chosen = [chosen[int(i)] for i in at]
    return tuple(chosen)


def _cut(pixels: Tensor, batch_size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    for number, part in enumerate(pixels.split(batch_size)):
        yield number, to_float(part, device)


def _losses(
    training: TokenizerTraining,
    pixels: Tensor,
    batch_size: int,
    seed: int,
    progress: float,
    device: torch.device,
) -> dict[str, float]:
    sums: dict[str, float] = {}
    for number, images in _cut(pixels, batch_size, device):
        generator = torch.Generator().manual_seed(derive_seed(seed, "held out", number))
        output = training(images, progress=progress, generator=generator)
        values = {f"/{name}": term.value for name, term in output.losses.items()}
        for name, value in {"": output.loss, **values}.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(images)
    return {f"eval/loss{name}": value / len(pixels) for name, value in sums.items()}


def _usage(
    tokenizer: VisualTokenizer, pixels: Tensor, batch_size: int, device: torch.device
) -> dict[str, float]:
    parts = [tokenizer.encode(images) for _, images in _cut(pixels, batch_size, device)]
    ids = [part.ids for part in parts if part.ids is not None]
    if not ids:
        return {}
    found = tokenizer.usage(torch.cat(ids), torch.cat([part.mask for part in parts]))
    return {f"eval/usage/{name.replace('/', '_')}": value for name, value in found.items()}


def _reconstructed(
    tokenizer: VisualTokenizer,
    pixels: Tensor,
    count: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Tensor:
    """[N, *sample_shape] on the CPU; generative decoders start from equal noise at all counts."""
    images = []
    for number, part in _cut(pixels, batch_size, device):
        tokens = tokenizer.encode(part, count)
        generator = torch.Generator().manual_seed(derive_seed(seed, "decode", number))
        images.append(tokenizer.decode(tokens, generator=generator).float().cpu())
    return torch.cat(images)
