"""Does my pipeline do what flowrl relies on? The rules are those of `check_pipeline`.

Reading order: `check_pipeline`, then what it calls, for flows and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.errors import FlowrlError
from flowrl.testing.words import check_images, require, require_same

PROMPTS = ("a red square", "two blue circles")
_ONE_CALL = "one call of the network that it is given"
_SHARED = (
    "network", "fingerprint", "embeds_guidance", "encode", "release_encoders", "decode",
    "save_full",
)  # fmt: skip
_FLOW = (
    *_SHARED, "latent_shape", "sigmas", "velocity", "encode_images", "lora_targets", "save_lora",
)  # fmt: skip
_TOKEN = (*_SHARED, "num_tokens", "groups", "logits", "start", "step")


def check_pipeline(
    pipeline: Any, *, prompts: Sequence[str] = PROMPTS, tolerance: float = 1e-4
) -> None:
    """Raises unless `pipeline` is a FlowPipeline or, where it has `logits`, a TokenPipeline.

    Both: all members; embeddings are detached CPU tensors, a row per prompt, of a shape that does
    not depend on the prompts, and a prompt's row does not depend on its neighbours; images are
    float [B, 3, H, W] in [0, 1] whatever is decoded, image by image; the network that is handed
    over is the one that is called; equal inputs give equal outputs.
    Flow: it encodes the empty prompt; its own images lead back to latents, image by image, and
    others are refused by a ValueError; sigmas descend strictly from at most 1 to exactly 0; a
    velocity has the latents' shape and a floating dtype, carries a gradient, and a row does not
    depend on its neighbours; guidance that is embedded moves it; a LoRA's targets exist.
    Token: it encodes the empty prompt; groups hold every position once; logits are [B, S, V], carry
    a gradient, do not see tokens of their own or later groups, and are the same step by step; a row
    does not depend on its neighbours.

    Args:
        pipeline: with its text encoders still there; nothing is released or saved.
        prompts: two or more that it understands.
        tolerance: absolute, for what may differ by rounding.
    """
    kind = _TOKEN if hasattr(pipeline, "logits") else _FLOW
    missing = [name for name in kind if not hasattr(pipeline, name)]
    whole = f"a class with {', '.join(kind)}"
    require(not missing, type(pipeline).__name__, whole, f"none of {', '.join(missing)}")
    network, fingerprint = pipeline.network, pipeline.fingerprint
    require(isinstance(network, nn.Module), "network", "an nn.Module", type(network).__name__)
    is_name = isinstance(fingerprint, str) and fingerprint != ""
    require(is_name, "fingerprint", "a str that is not empty", repr(fingerprint))
    device = next(network.parameters()).device
    # A model is guided by its empty prompt, which a policy always encodes.
    rows = _check_encode(pipeline.encode, [*prompts, ""], tolerance)
    conditioning = {name: value.to(device) for name, value in rows.items()}
    if kind is _TOKEN:
        _check_logits(pipeline, conditioning, device, tolerance)
    else:
        _check_sigmas(pipeline.sigmas)
        _check_velocity(pipeline, conditioning, device, tolerance)
        _check_lora_targets(pipeline)


def _check_encode(
    encode: Callable[[list[str]], dict[str, Tensor]], prompts: list[str], tolerance: float
) -> dict[str, Tensor]:
    require(len(prompts) > 1, "prompts", "two or more", len(prompts))
    together, alone = encode(prompts), encode(prompts[-1:])
    is_dict = isinstance(together, dict) and len(together) > 0
    require(is_dict, "encode", "a dict of named tensors", type(together).__name__)
    for name, rows in together.items():
        what = f"encode()[{name!r}]"
        require(isinstance(rows, Tensor), what, "a tensor", type(rows).__name__)
        require(rows.device.type == "cpu", what, "on the CPU", rows.device)
        require(not rows.requires_grad, what, "detached", "a tensor with gradient")
        require(len(rows) == len(prompts), what, "a row per prompt", tuple(rows.shape))
        shape = tuple(alone[name].shape[1:]) if name in alone else "nothing"
        require(
            shape == rows.shape[1:], f"{what} of {prompts[-1]!r} alone",
            f"of the shape that it has beside others, {tuple(rows.shape[1:])} (pad to a fixed "
            "length)", shape,
        )  # fmt: skip
        require_same(rows[-1:], alone[name], tolerance, f"{what} of a prompt", "encoded alone")
    return together


def _check_sigmas(sigmas: Callable[[int], Tensor]) -> None:
    for num_steps in (2, 5):
        levels, what = sigmas(num_steps), f"sigmas({num_steps})"
        is_long = levels.shape == (num_steps + 1,)
        require(is_long, what, f"[{num_steps + 1}], one more than steps", tuple(levels.shape))
        is_plain = levels.dtype == torch.float32 and levels.device.type == "cpu"
        require(is_plain, what, "float32, CPU", f"{levels.dtype}, {levels.device}")
        require((levels.diff() < 0).all(), what, "strictly descending", levels.tolist())
        is_whole = bool(levels[0] <= 1) and levels[-1].item() == 0
        require(is_whole, what, "from at most 1 to exactly 0", levels.tolist())


def _check_velocity(
    pipeline: Any, rows: dict[str, Tensor], device: torch.device, tolerance: float
) -> None:
    num = len(next(iter(rows.values())))
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(num, *pipeline.latent_shape, generator=generator).to(device)
    sigma = torch.linspace(0.9, 0.3, num, device=device)
    recorder = _Recorder(pipeline.network)
    if pipeline.embeds_guidance:
        rows = rows | {"guidance": torch.full((num,), 3.5, device=device)}

    def velocity(index: Tensor, **changed: Tensor) -> Tensor:
        chosen = {name: value[index] for name, value in (rows | changed).items()}
        output: Tensor = pipeline.velocity(recorder, x_t[index], sigma[index], chosen)
        return output

    everyone = torch.arange(num, device=device)
    output = velocity(everyone)
    require(recorder.calls == 1, "velocity", _ONE_CALL, f"{recorder.calls} calls")
    shape = tuple(output.shape)
    require(shape == x_t.shape, "velocity", f"as the latents, {tuple(x_t.shape)}", shape)
    _check_output(output, "velocity")
    with torch.no_grad():
        again, alone = velocity(everyone), velocity(everyone[-1:])
    require_same(output, again, 0.0, "velocity", "for equal inputs (no dropout)")
    require_same(output[-1:], alone, tolerance, "a row of velocity", "computed alone")
    if pipeline.embeds_guidance:
        with torch.no_grad():
            moved = not torch.equal(velocity(everyone, guidance=rows["guidance"] + 2), output)
        what = 'velocity with another "guidance"'
        require(moved, what, "another one, because embeds_guidance is True", "the same")
    _check_decode(pipeline.decode, x_t, 100 * x_t, tolerance)
    _check_encode_images(pipeline.encode_images, pipeline.decode(x_t), tuple(x_t.shape), tolerance)


def _check_encode_images(
    encode: Callable[[Tensor], Tensor], images: Tensor, shape: tuple[int, ...], tolerance: float
) -> None:
    latents, what = encode(images), "encode_images()"
    require(tuple(latents.shape) == shape, what, f"as the latents, {shape}", tuple(latents.shape))
    require(not latents.requires_grad, what, "detached", "latents with gradient")
    require_same(latents, encode(images), 0.0, what, "for equal images (no drawing)")
    require_same(latents[-1:], encode(images[-1:]), tolerance, "a latent", "encoded alone")
    try:
        encode(images[..., 1:])
    except ValueError:
        return
    require(False, f"{what} of images that are a column short", "a ValueError", "no error")


def _check_logits(
    pipeline: Any, rows: dict[str, Tensor], device: torch.device, tolerance: float
) -> None:
    num, length = len(next(iter(rows.values()))), pipeline.num_tokens
    recorder = _Recorder(pipeline.network)

    def logits(tokens: Tensor) -> Tensor:
        chosen = {name: value[: len(tokens)] for name, value in rows.items()}
        output: Tensor = pipeline.logits(recorder, tokens, chosen)
        return output

    output = logits(torch.zeros(num, length, dtype=torch.int64, device=device))
    require(recorder.calls == 1, "logits", _ONE_CALL, f"{recorder.calls} calls")
    is_shaped = output.ndim == 3 and output.shape[:2] == (num, length)
    require(is_shaped, "logits", f"[{num}, {length}, V]", tuple(output.shape))
    _check_output(output, "logits")
    vocabulary = output.shape[-1]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (num, length), generator=generator).to(device)
    groups = [group.to(device) for group in pipeline.groups]
    positions = torch.cat(groups).sort().values
    is_whole = torch.equal(positions.cpu(), torch.arange(length))
    require(is_whole, "groups", f"of all positions 0 to {length - 1}, once", positions.tolist())
    middle = len(groups) // 2
    later = tokens.clone()
    hidden = torch.cat(groups[middle:])
    later[:, hidden] = (tokens[:, hidden] + 1) % vocabulary
    with torch.no_grad():
        output, again, alone = logits(tokens), logits(tokens), logits(tokens[:1])
        changed = logits(later)
        state = pipeline.start(pipeline.network, rows)
        steps = [pipeline.step(pipeline.network, state, tokens) for _ in groups]
    require_same(output, again, 0.0, "logits", "for equal inputs (no dropout)")
    require_same(output[:1], alone, tolerance, "a row of logits", "computed alone")
    seen = torch.cat(groups[: middle + 1])
    begun = f"logits up to group {middle}"
    what = f"with other tokens from group {middle} on"
    require_same(output[:, seen], changed[:, seen], tolerance, begun, what)
    for number, (group, step) in enumerate(zip(groups, steps, strict=True)):
        here = f"step() of group {number}"
        require_same(step, output[:, group], tolerance, here, "in logits() of the whole sequence")
    _check_decode(pipeline.decode, tokens, later, tolerance)


def _check_output(output: Tensor, what: str) -> None:
    require(output.is_floating_point(), what, "of a floating dtype", output.dtype)
    require(output.isfinite().all(), what, "finite", "NaN or infinity")
    require(output.requires_grad, what, "with a gradient", "a detached tensor")


def _check_decode(
    decode: Callable[[Tensor], Tensor], usual: Tensor, extreme: Tensor, tolerance: float
) -> None:
    for inputs in (usual, extreme):
        images = decode(inputs)
        check_images(images, len(inputs), "decode()")
        alone = decode(inputs[-1:])
        require_same(images[-1:], alone, tolerance, "an image of decode()", "decoded alone")


def _check_lora_targets(pipeline: Any) -> None:
    try:
        targets = pipeline.lora_targets()
    except (FlowrlError, NotImplementedError, ValueError):
        return  # it says that there is no LoRA of it
    names = [name for name, _ in pipeline.network.named_modules()]
    layers = ", ".join(sorted({name.rpartition(".")[2] for name in names} - {""}))
    for target in targets:
        is_there = any(f".{name}".endswith(f".{target}") for name in names)
        require(is_there, "lora_targets()", f"layers of the network ({layers})", repr(target))


class _Recorder(nn.Module):
    """Stands for a wrapper of the network, as a distributed run has one, and counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own output."""
        self.calls += 1
        return self.network(*args, **kwargs)
