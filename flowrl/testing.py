"""Conformance checkers for authors of plug-ins: does my class do what flowrl relies on?

    from flowrl.testing import check_pipeline, check_policy, check_reward

Each takes a live object, small enough to run a few times, and raises an AssertionError (or one of
flowrl's errors) that says which rule is broken, what was expected and what arrived. Nothing has to
be inherited. The rules are the sentences in the docstrings; the code follows their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.errors import FlowrlError
from flowrl.functional.shapes import at_least_float32
from flowrl.train.attempts import Patience
from flowrl.train.border import check_output
from flowrl.train.scoring import RewardSet
from flowrl.types import Decisions, Prompt, PromptBatch, Rollout

PROMPTS = ("a red square", "two blue circles")
_ONE_CALL = "one call of the network that it is given"
_SHARED = ("network", "fingerprint", "encode", "release_encoders", "decode", "save_full")
_FLOW = (
    *_SHARED, "embeds_guidance", "latent_shape", "sigmas", "velocity", "encode_images",
    "lora_targets", "save_lora",
)  # fmt: skip
_TOKEN = (*_SHARED, "num_tokens", "logits")


# --------------------------------------------------------------------------- pipelines


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
    Token: logits are [B, S, V], carry a gradient, do not see the present or later tokens, and are
    the same for the beginning of a sequence; a row does not depend on its neighbours.

    Args:
        pipeline: with its text encoders still there; nothing is released or saved.
        prompts: two or more that it understands.
        tolerance: absolute, for what may differ by rounding.
    """
    kind = _TOKEN if hasattr(pipeline, "logits") else _FLOW
    missing = [name for name in kind if not hasattr(pipeline, name)]
    whole = f"a class with {', '.join(kind)}"
    _require(not missing, type(pipeline).__name__, whole, f"none of {', '.join(missing)}")
    network, fingerprint = pipeline.network, pipeline.fingerprint
    _require(isinstance(network, nn.Module), "network", "an nn.Module", type(network).__name__)
    is_name = isinstance(fingerprint, str) and fingerprint != ""
    _require(is_name, "fingerprint", "a str that is not empty", repr(fingerprint))
    device = next(network.parameters()).device
    # A flow is guided by its empty prompt, which a policy always encodes.
    asked = [*prompts] if kind is _TOKEN else [*prompts, ""]
    rows = _check_encode(pipeline.encode, asked, tolerance)
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
    _require(len(prompts) > 1, "prompts", "two or more", len(prompts))
    together, alone = encode(prompts), encode(prompts[-1:])
    is_dict = isinstance(together, dict) and len(together) > 0
    _require(is_dict, "encode", "a dict of named tensors", type(together).__name__)
    for name, rows in together.items():
        what = f"encode()[{name!r}]"
        _require(isinstance(rows, Tensor), what, "a tensor", type(rows).__name__)
        _require(rows.device.type == "cpu", what, "on the CPU", rows.device)
        _require(not rows.requires_grad, what, "detached", "a tensor with gradient")
        _require(len(rows) == len(prompts), what, "a row per prompt", tuple(rows.shape))
        shape = tuple(alone[name].shape[1:]) if name in alone else "nothing"
        _require(
            shape == rows.shape[1:], f"{what} of {prompts[-1]!r} alone",
            f"of the shape that it has beside others, {tuple(rows.shape[1:])} (pad to a fixed "
            "length)", shape,
        )  # fmt: skip
        _require_same(rows[-1:], alone[name], tolerance, f"{what} of a prompt", "encoded alone")
    return together


def _check_sigmas(sigmas: Callable[[int], Tensor]) -> None:
    for num_steps in (2, 5):
        levels, what = sigmas(num_steps), f"sigmas({num_steps})"
        is_long = levels.shape == (num_steps + 1,)
        _require(is_long, what, f"[{num_steps + 1}], one more than steps", tuple(levels.shape))
        is_plain = levels.dtype == torch.float32 and levels.device.type == "cpu"
        _require(is_plain, what, "float32, CPU", f"{levels.dtype}, {levels.device}")
        _require((levels.diff() < 0).all(), what, "strictly descending", levels.tolist())
        is_whole = bool(levels[0] <= 1) and levels[-1].item() == 0
        _require(is_whole, what, "from at most 1 to exactly 0", levels.tolist())


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
    _require(recorder.calls == 1, "velocity", _ONE_CALL, f"{recorder.calls} calls")
    shape = tuple(output.shape)
    _require(shape == x_t.shape, "velocity", f"as the latents, {tuple(x_t.shape)}", shape)
    _check_output(output, "velocity")
    with torch.no_grad():
        again, alone = velocity(everyone), velocity(everyone[-1:])
    _require_same(output, again, 0.0, "velocity", "for equal inputs (no dropout)")
    _require_same(output[-1:], alone, tolerance, "a row of velocity", "computed alone")
    if pipeline.embeds_guidance:
        with torch.no_grad():
            moved = not torch.equal(velocity(everyone, guidance=rows["guidance"] + 2), output)
        what = 'velocity with another "guidance"'
        _require(moved, what, "another one, because embeds_guidance is True", "the same")
    _check_decode(pipeline.decode, x_t, 100 * x_t, tolerance)
    _check_encode_images(pipeline.encode_images, pipeline.decode(x_t), tuple(x_t.shape), tolerance)


def _check_encode_images(
    encode: Callable[[Tensor], Tensor], images: Tensor, shape: tuple[int, ...], tolerance: float
) -> None:
    latents, what = encode(images), "encode_images()"
    _require(tuple(latents.shape) == shape, what, f"as the latents, {shape}", tuple(latents.shape))
    _require(not latents.requires_grad, what, "detached", "latents with gradient")
    _require_same(latents, encode(images), 0.0, what, "for equal images (no drawing)")
    _require_same(latents[-1:], encode(images[-1:]), tolerance, "a latent", "encoded alone")
    try:
        encode(images[..., 1:])
    except ValueError:
        return
    _require(False, f"{what} of images that are a column short", "a ValueError", "no error")


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
    _require(recorder.calls == 1, "logits", _ONE_CALL, f"{recorder.calls} calls")
    is_shaped = output.ndim == 3 and output.shape[:2] == (num, length)
    _require(is_shaped, "logits", f"[{num}, {length}, V]", tuple(output.shape))
    _check_output(output, "logits")
    vocabulary = output.shape[-1]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (num, length), generator=generator).to(device)
    middle = length // 2
    later = tokens.clone()
    later[:, middle:] = (tokens[:, middle:] + 1) % vocabulary
    begun = f"logits up to position {middle}"
    with torch.no_grad():
        output, again, alone = logits(tokens), logits(tokens), logits(tokens[:1])
        changed, short = logits(later), logits(tokens[:, : middle + 1])
    _require_same(output, again, 0.0, "logits", "for equal inputs (no dropout)")
    _require_same(output[:1], alone, tolerance, "a row of logits", "computed alone")
    seen, changed = output[:, : middle + 1], changed[:, : middle + 1]
    _require_same(seen, changed, tolerance, begun, f"with other tokens from position {middle} on")
    _require_same(seen, short, tolerance, begun, "of the beginning of the sequence alone")
    _check_decode(pipeline.decode, tokens, later, tolerance)


def _check_output(output: Tensor, what: str) -> None:
    _require(output.is_floating_point(), what, "of a floating dtype", output.dtype)
    _require(output.isfinite().all(), what, "finite", "NaN or infinity")
    _require(output.requires_grad, what, "with a gradient", "a detached tensor")


def _check_decode(
    decode: Callable[[Tensor], Tensor], usual: Tensor, extreme: Tensor, tolerance: float
) -> None:
    for inputs in (usual, extreme):
        images = decode(inputs)
        _check_images(images, len(inputs), "decode()")
        alone = decode(inputs[-1:])
        _require_same(images[-1:], alone, tolerance, "an image of decode()", "decoded alone")


def _check_lora_targets(pipeline: Any) -> None:
    try:
        targets = pipeline.lora_targets()
    except (FlowrlError, NotImplementedError, ValueError):
        return  # it says that there is no LoRA of it
    names = [name for name, _ in pipeline.network.named_modules()]
    layers = ", ".join(sorted({name.rpartition(".")[2] for name in names} - {""}))
    for target in targets:
        is_there = any(f".{name}".endswith(f".{target}") for name in names)
        _require(is_there, "lora_targets()", f"layers of the network ({layers})", repr(target))


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


# --------------------------------------------------------------------------- policies


def check_policy(
    policy: Any,
    batch: PromptBatch,
    plan: Any,
    *,
    ratio_tolerance: float = 1e-5,
    tolerance: float = 1e-4,
) -> None:
    """Raises unless `policy` is a Policy that can be trained on `batch` with `plan`.

    A rollout has an image per sample, in [0, 1] on the CPU; its log-probs are float32, detached and
    finite; rows ascend, and rows and samples exist. The same batch gives the same rollout, bit by
    bit, without touching torch's global random state. On the first pass the ratio is 1, and the
    log-probs of `evaluate` carry a gradient to the trainable parameters. Neither the samples that
    are drawn together nor the decisions that are scored together change a result.

    Args:
        policy: with its prompts encoded.
        batch: of two samples or more; groups stand together.
        plan: as its method makes it.
        ratio_tolerance: how far from 0 a log-ratio may be on the first pass.
        tolerance: absolute, for what may differ by rounding.
    """
    state = torch.get_rng_state()
    rollout, trajectory = policy.rollout(batch, plan)
    _require(
        torch.equal(torch.get_rng_state(), state), "rollout()", "without torch's global random "
        "state (use flowrl.data.noise, seeded by the batch)", "another state",
    )  # fmt: skip
    decisions = trajectory.decisions
    _check_rollout(rollout, decisions, trajectory.num_rows, len(batch))
    again, repeated = policy.rollout(batch, plan)
    twice = "for the same batch again"
    _require_same(rollout.images, again.images, 0.0, "rollout().images", twice)
    old = decisions.old_log_prob
    _require_same(old, repeated.decisions.old_log_prob, 0.0, "old_log_prob", twice)
    _check_ratio(policy, trajectory, ratio_tolerance, tolerance)
    start, part = _last_group(batch)
    few, shorter = policy.rollout(part, plan)
    fewer = "drawn with fewer neighbours"
    _require_same(rollout.images[start:], few.images, tolerance, "the image of a sample", fewer)
    mine, alone = _by_sample(decisions, start), _by_sample(shorter.decisions, 0)
    _require_same(mine, alone, tolerance, "old_log_prob of a sample", fewer)


def _check_rollout(rollout: Rollout, decisions: Decisions, num_rows: int, num: int) -> None:
    _check_images(rollout.images, num, "rollout().images")
    _require(rollout.images.device.type == "cpu", "images", "on the CPU", rollout.images.device)
    old, what = decisions.old_log_prob, "decisions.old_log_prob"
    _require(len(old) > 0, "the plan", "one that trains a decision at least", "none")
    _require(old.dtype == torch.float32, what, "float32", old.dtype)
    _require(not old.requires_grad, what, "detached", "a tensor with gradient")
    is_finite = old[decisions.mask].isfinite().all()
    _require(is_finite, what, "finite where the mask is True", "NaN or infinity")
    for name, limit in (("row", num_rows), ("sample", num)):
        values: Tensor = getattr(decisions, name)
        is_inside = ((values >= 0) & (values < limit)).all()
        _require(is_inside, f"decisions.{name}", f"in [0, {limit})", values.tolist())
    is_ascending = (decisions.row.diff() >= 0).all()
    _require(is_ascending, "decisions.row", "ascending", decisions.row.tolist())


def _check_ratio(policy: Any, trajectory: Any, ratio_tolerance: float, tolerance: float) -> None:
    old, mask = trajectory.decisions.old_log_prob, trajectory.decisions.mask
    everyone = torch.arange(len(old))
    new, what = policy.evaluate(trajectory, everyone).log_prob, "evaluate().log_prob"
    _require(new.shape == old.shape, what, f"as old_log_prob, {tuple(old.shape)}", tuple(new.shape))
    _require(new.dtype == torch.float32, what, "float32", new.dtype)
    _require(new.requires_grad, what, "with a gradient", "a detached tensor")
    log_ratio = float((new.detach().cpu() - old)[mask].abs().max())
    _require(
        log_ratio <= ratio_tolerance, "the ratio on the first pass", "1, so rollout and evaluate "
        "must call the same transition", f"|log_ratio| up to {log_ratio:.2e}",
    )  # fmt: skip
    trainable = list(policy.weights.trainable())
    total = new[mask.to(new.device)].sum()
    gradients = torch.autograd.grad(total, trainable, allow_unused=True)
    has_any = any(g is not None and bool(g.abs().max() > 0) for g in gradients)
    _require(has_any, f"the gradient of {what}", "in weights.trainable()", "none there")
    with torch.no_grad():
        cuts = [everyone[i : i + 3] for i in range(0, len(everyone), 3)]
        parts = [policy.evaluate(trajectory, index).log_prob for index in cuts]
    _require_same(new, torch.cat(parts), tolerance, what, "scored in parts of 3")


def _by_sample(decisions: Decisions, start: int) -> Tensor:
    """old_log_prob of the samples from `start` on, ordered by sample, then as stored."""
    order = decisions.sample.argsort(stable=True)
    return decisions.old_log_prob[order[decisions.sample[order] >= start]]


def _last_group(batch: PromptBatch) -> tuple[int, PromptBatch]:
    """(its first sample, the last group), or the last half where there is only one group."""
    start = int((batch.group_id != batch.group_id[-1]).sum()) or len(batch) // 2
    _require(start > 0, "the batch", "two samples or more", len(batch))
    return start, batch.select(torch.arange(start, len(batch)))


# --------------------------------------------------------------------------- rewards


def check_reward(
    reward: Any,
    *,
    images: Tensor | None = None,
    prompts: Sequence[Prompt] | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Raises unless `reward` is a Reward.

    It declares inputs, scope and range that exist; `score`, called with the declared inputs by
    keyword, returns a float per sample within the range, or a mapping of such tensors with "score"
    among them. Equal inputs give equal scores; a shuffled batch gives shuffled scores; samples of
    one prompt keep scores of their own; with scope "sample" a score does not depend on the other
    samples. A sample whose image is not a number is scored NaN, and the others as before, or, with
    scope "group", by a number still.

    Args:
        reward: the object.
        images: float32 [N, 3, H, W] in [0, 1] on the CPU, N >= 3, on which the scores should
            differ; None = noise of 64 x 64 pixels of growing brightness. A reward that declares
            videos is given films of them, [N, 2, 3, H, W], one that declares texts their numbers as
            words, and one that declares latents the images at an eighth of their size.
        prompts: N of them, with the metadata that the reward reads; None = GenEval's rows, or one
            row N times with scope "group", whose calls hold the samples of one prompt.
        tolerance: absolute, for what may differ by rounding.
    """
    members = ("inputs", "scope", "range", "score")
    missing = [name for name in members if not hasattr(reward, name)]
    whole = f"a class with {', '.join(members)}"
    _require(not missing, type(reward).__name__, whole, f"none of {', '.join(missing)}")
    if images is None:
        brightness = torch.linspace(0.25, 1, 4)[:, None, None, None]
        noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        images = noise * brightness
    if prompts is None:
        colors = ("red", "orange", "yellow", "green", "cyan", "blue", "purple")
        num = 1 if reward.scope == "group" else len(colors)
        prompts = [_geneval(colors[i % num]) for i in range(len(images))]
    _require(len(images) == len(prompts) >= 3, "images and prompts", "as many, 3 or more",
             f"{len(images)} and {len(prompts)}")  # fmt: skip
    name = type(reward).__name__
    rewards = RewardSet(
        [(name, reward, 1.0)], patience=Patience(retries=0), provides=tuple(_samples(images, []))
    )
    everyone = list(range(len(images)))
    rewards.probe(prompts[0], **_samples(images, [0, 1]))

    def score(order: list[int], asked: Sequence[Prompt] = prompts) -> Tensor:
        batch = PromptBatch.one_group([asked[i] for i in order])
        found = rewards.score(batch, **_samples(images, order))
        reason = found.failures[name].reason if name in found.failures else ""
        _require(not reason, f"a call with {len(order)} samples", "answered", reason)
        return found.rewards[name]

    scores, backwards = score(everyone), everyone[::-1]
    _require_same(scores, score(everyone), 0.0, "the scores", "for the same batch again")
    turned = score(backwards)
    _require_same(scores[backwards], turned, tolerance, "the scores", "with the batch backwards")
    if reward.scope == "sample":
        alone = torch.cat([score([i]) for i in everyone])
        _require_same(scores, alone, tolerance, 'with scope "sample" the scores', "one by one")
        same = [prompts[0]] * len(prompts)
        alone = torch.cat([score([i], same) for i in everyone])
        what = "the scores of samples of one prompt"
        _require_same(score(everyone, same), alone, tolerance, what, "one by one")
    if "images" in reward.inputs:
        _check_broken_image(reward, images, prompts, scores, tolerance)


def _check_broken_image(
    reward: Any, images: Tensor, prompts: Sequence[Prompt], scores: Tensor, tolerance: float
) -> None:
    broken = images.clone()
    broken[1] = torch.nan
    available: dict[str, Any] = {
        "images": broken,
        "prompts": [prompt.text for prompt in prompts],
        "metadata": [prompt.metadata for prompt in prompts],
    }
    output = reward.score(**{name: available[name] for name in reward.inputs})
    values = check_output(type(reward).__name__, reward, output, len(images))["score"]
    wanted = "NaN (a sample that cannot be scored is invalid, never a number)"
    _require(not values[1].isfinite(), "the score of an image of NaN", wanted, f"{values[1]:g}")
    others = torch.arange(len(images)) != 1
    if reward.scope == "sample":
        what, beside = "the scores", "beside an image of NaN"
        _require_same(scores[others], values[others], tolerance, what, beside)
        return
    lost = (scores.isfinite() & ~values.isfinite())[others]
    what, arrived = "the scores beside an image of NaN", f"NaN for {int(lost.sum())} more"
    _require(not lost.any(), f'with scope "group" {what}', "numbers still", arrived)


def _samples(images: Tensor, order: list[int]) -> dict[str, Any]:
    """What a reward may read of these images, in this order; see `check_reward`."""
    chosen = images[order]
    return {
        "images": chosen,
        "videos": torch.stack([chosen, chosen.flip(-1)], dim=1),
        "texts": [f"number {i}" for i in order],
        "latents": chosen[..., ::8, ::8],
    }


def _geneval(color: str) -> Prompt:
    text = f"a {color} circle"
    wanted = {"class": "circle", "count": 1, "color": color}
    return Prompt(text, {"tag": "colors", "include": [wanted], "prompt": text})


# --------------------------------------------------------------------------- words


def _check_images(images: Tensor, num: int, what: str) -> None:
    is_shaped = images.ndim == 4 and images.shape[:2] == (num, 3)
    _require(is_shaped, what, f"[{num}, 3, H, W]", tuple(images.shape))
    _require(images.is_floating_point(), what, "of a floating dtype", images.dtype)
    _require(not images.requires_grad, what, "detached", "images with gradient")
    low, high = (float(each) for each in images.aminmax())
    _require(low >= 0 and high <= 1, what, "in [0, 1]", f"[{low:.4g}, {high:.4g}]")


def _require(holds: bool | Tensor, what: str, expected: str, arrived: object) -> None:
    if not holds:
        raise AssertionError(f"{what} must be {expected}; got {arrived}")


def _require_same(one: Tensor, two: Tensor, tolerance: float, what: str, otherwise: str) -> None:
    """Equal within the tolerance; NaN equals NaN."""
    one, two = (at_least_float32(each.detach().cpu()) for each in (one, two))
    shapes = f"{tuple(one.shape)} and {tuple(two.shape)}"
    _require(one.shape == two.shape, what, f"of the same shape {otherwise}", shapes)
    is_same = torch.allclose(one, two, rtol=0, atol=tolerance, equal_nan=True)
    far = (one - two).abs().nan_to_num(torch.inf).max() if one.numel() else 0.0
    limit = f", more than {tolerance:.0e}" if tolerance else ""
    _require(is_same, what, f"the same {otherwise}", f"a difference of {far:.2e}{limit}")
