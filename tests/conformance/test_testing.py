"""The conformance checkers accept our own classes and refuse one broken object per rule.

Each broken object differs from a working toy in one method, and the message names what it broke; a
checker that lost the rule would let it pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowrl.data.sampler import GroupSampler
from flowrl.errors import RewardError
from flowrl.make.shapes_model import build_pipeline, build_vae
from flowrl.methods.flow import mix_grpo
from flowrl.policies.flow import FlowPolicy, FlowTrajectory
from flowrl.policies.token import TokenPolicy
from flowrl.policies.weights import FullWeights
from flowrl.testing import check_pipeline, check_policy, check_reward
from flowrl.toys import (
    TARGETS,
    SymbolReward,
    TargetReward,
    ToyFlowPipeline,
    ToyTokenPipeline,
    flow_prompts,
    token_prompts,
)
from flowrl.types import Evaluation, Prompt, PromptBatch, Rollout
from pipelines.flux import Flux
from pipelines.sd3 import StableDiffusion3
from rewards.shapes.reward import ShapesReward
from rewards.simple import Brightness
from tests.artefacts.flux_folder import tiny_transformer, write_flux

DIRECTIONS = tuple(TARGETS)
SYMBOLS = ("symbol 3", "symbol 7", "symbol 1")


# --------------------------------------------------------------------------- our own classes


def trained(pipeline: Any) -> Any:
    """A toy that no longer begins as zero, so that its prompts and tokens matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in pipeline.network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def test_toy_pipelines_conform() -> None:
    check_pipeline(trained(ToyFlowPipeline()), prompts=DIRECTIONS)
    check_pipeline(trained(ToyTokenPipeline()), prompts=SYMBOLS)


@pytest.mark.parametrize("schedule", ["diffusers", "linear"])
def test_stable_diffusion_3_conforms(tmp_path: Path, schedule: Any) -> None:
    build_pipeline(build_vae(), seed=0).save_pretrained(tmp_path)
    check_pipeline(StableDiffusion3(str(tmp_path), max_sequence_length=12, schedule=schedule))


def test_flux_conforms(tmp_path: Path) -> None:
    write_flux(tmp_path, tiny_transformer())
    check_pipeline(Flux(str(tmp_path), height=32, width=48, max_sequence_length=8))


@pytest.mark.parametrize("graded", [False, True])
def test_shapes_reward_conforms(graded: bool) -> None:
    check_reward(ShapesReward(graded=graded))


def test_brightness_conforms() -> None:
    check_reward(Brightness())


def test_toy_rewards_conform() -> None:
    images = ToyFlowPipeline().decode(torch.tensor([[1.0, 0.5], [-1, 0.2], [0.3, 1], [0, -1]]))
    check_reward(TargetReward(), images=images.clone(), prompts=flow_prompts())
    tokens = torch.randint(4, (16, 16), generator=torch.Generator().manual_seed(0))
    check_reward(
        SymbolReward(), images=ToyTokenPipeline().decode(tokens).clone(), prompts=token_prompts()
    )


def test_policies_conform() -> None:
    check_policy(flow_policy(), batch(flow_prompts()), PLAN)
    check_policy(token_policy(), batch(token_prompts()), None)


PLAN = mix_grpo(num_steps=4, window=2).plan(0)


def batch(prompts: tuple[Prompt, ...], *, num_groups: int = 3) -> PromptBatch:
    return GroupSampler(
        prompts,
        num_groups=num_groups,
        group_size=4,
        updates_per_rollout=1,
        seed=0,
        shuffle=True,
        rank=0,
        world_size=1,
    )(0)


def flow_policy(cls: type[FlowPolicy] = FlowPolicy) -> FlowPolicy:
    pipeline = trained(ToyFlowPipeline())
    policy = cls(pipeline, FullWeights(pipeline.network, with_reference=False))
    policy.precompute(DIRECTIONS, None)
    return policy


def token_policy() -> TokenPolicy:
    pipeline = trained(ToyTokenPipeline())
    weights = FullWeights(pipeline.network, with_reference=False)
    return TokenPolicy(pipeline, weights, rollout_batch_size=64, decode_batch_size=64, device="cpu")


# --------------------------------------------------------------------------- broken flow pipelines

Encoded = dict[str, Tensor]


class NoDecode(ToyFlowPipeline):
    decode = property()  # type: ignore[assignment]


class NetworkIsAFunction(ToyFlowPipeline):
    def __init__(self) -> None:
        self.network = lambda *inputs: inputs[0]  # type: ignore[assignment]


class NoFingerprint(ToyFlowPipeline):
    fingerprint = ""


class EncodesToATuple(ToyFlowPipeline):
    def encode(self, prompts: Sequence[str]) -> Any:
        return tuple(super().encode(prompts).values())


class EncodesOneRow(ToyFlowPipeline):
    def encode(self, prompts: Sequence[str]) -> Encoded:
        return {"prompt": super().encode(prompts)["prompt"][:1]}


class EncodesWithGradient(ToyFlowPipeline):
    def encode(self, prompts: Sequence[str]) -> Encoded:
        return super().encode(prompts) | {"embeds": torch.ones(len(prompts), requires_grad=True)}


class PadsToTheLongest(ToyFlowPipeline):
    def encode(self, prompts: Sequence[str]) -> Encoded:
        longest = max(len(text) for text in prompts)
        return super().encode(prompts) | {"embeds": torch.zeros(len(prompts), longest)}


class EncodesByPosition(ToyFlowPipeline):
    def encode(self, prompts: Sequence[str]) -> Encoded:
        return super().encode(prompts) | {"embeds": torch.arange(len(prompts))[:, None]}


class IgnoresItsGuidance(ToyFlowPipeline):
    embeds_guidance = True


class TooFewSigmas(ToyFlowPipeline):
    def sigmas(self, num_steps: int) -> Tensor:
        return super().sigmas(num_steps)[:-1]


class SigmasInDouble(ToyFlowPipeline):
    def sigmas(self, num_steps: int) -> Tensor:
        return super().sigmas(num_steps).double()


class SigmasAscend(ToyFlowPipeline):
    def sigmas(self, num_steps: int) -> Tensor:
        return super().sigmas(num_steps).flip(0)


class SigmasStopShort(ToyFlowPipeline):
    def sigmas(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0.01, num_steps + 1)


class SigmasAreTimesteps(ToyFlowPipeline):
    def sigmas(self, num_steps: int) -> Tensor:
        return 1000 * super().sigmas(num_steps)


class Velocity(ToyFlowPipeline):
    """A toy whose velocity is changed by `change`."""

    def velocity(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        return self.change(super().velocity(network, x_t, sigma, conditioning))

    def change(self, velocity: Tensor) -> Tensor:
        return velocity


class VelocityOfItsOwnNetwork(ToyFlowPipeline):
    def velocity(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        return super().velocity(self.network, x_t, sigma, conditioning)


class FlatVelocity(Velocity):
    def change(self, velocity: Tensor) -> Tensor:
        return velocity.flatten()


class IntegerVelocity(Velocity):
    def change(self, velocity: Tensor) -> Tensor:
        return velocity.long()


class NonFiniteVelocity(Velocity):
    def change(self, velocity: Tensor) -> Tensor:
        return velocity / 0


class DetachedVelocity(Velocity):
    def change(self, velocity: Tensor) -> Tensor:
        return velocity.detach()


class RandomVelocity(Velocity):
    def change(self, velocity: Tensor) -> Tensor:
        return torch.nn.functional.dropout(velocity)


class MixesRows(Velocity):
    def change(self, velocity: Tensor) -> Tensor:
        return velocity - velocity.mean(dim=0)


class DecodesChannelsLast(ToyFlowPipeline):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents).permute(0, 2, 3, 1)


class DecodesToBytes(ToyFlowPipeline):
    def decode(self, latents: Tensor) -> Tensor:
        return (255 * super().decode(latents)).byte()


class DecodesFromMinusOne(ToyFlowPipeline):
    def decode(self, latents: Tensor) -> Tensor:
        return 2 * super().decode(latents) - 1


class DecodesWithoutClamping(ToyFlowPipeline):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) * latents.norm(dim=1)[:, None, None, None] / 10


class DecodesWithGradient(ToyFlowPipeline):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) * torch.ones((), requires_grad=True)


class NormalisesOverTheBatch(ToyFlowPipeline):
    def decode(self, latents: Tensor) -> Tensor:
        images = super().decode(latents)
        return images / images.sum()


class FlatLatents(ToyFlowPipeline):
    def encode_images(self, images: Tensor) -> Tensor:
        return super().encode_images(images).flatten()


class LatentsWithGradient(ToyFlowPipeline):
    def encode_images(self, images: Tensor) -> Tensor:
        return super().encode_images(images) * torch.ones((), requires_grad=True)


class DrawsItsLatents(ToyFlowPipeline):
    def encode_images(self, images: Tensor) -> Tensor:
        mean = super().encode_images(images)
        return mean + torch.randn_like(mean)


class CentresLatents(ToyFlowPipeline):
    def encode_images(self, images: Tensor) -> Tensor:
        latents = super().encode_images(images)
        return latents - latents.mean()


class EncodesAnySize(ToyFlowPipeline):
    def encode_images(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))[:, :2]


class AdaptsNoLayer(ToyFlowPipeline):
    def lora_targets(self) -> list[str]:
        return ["enter", "to_q"]


FLOW = {
    NoDecode: "none of decode",
    NetworkIsAFunction: "network must be an nn.Module; got function",
    NoFingerprint: "fingerprint must be a str that is not empty",
    EncodesToATuple: "encode must be a dict of named tensors; got tuple",
    EncodesOneRow: "a row per prompt",
    EncodesWithGradient: r"encode\(\)\['embeds'\] must be detached",
    PadsToTheLongest: "pad to a fixed length",
    EncodesByPosition: "the same encoded alone",
    IgnoresItsGuidance: "because embeds_guidance is True; got the same",
    TooFewSigmas: "one more than steps",
    SigmasInDouble: "float32, CPU; got torch.float64",
    SigmasAscend: "strictly descending",
    SigmasStopShort: "from at most 1 to exactly 0",
    SigmasAreTimesteps: "from at most 1 to exactly 0",
    VelocityOfItsOwnNetwork: "one call of the network that it is given; got 0 calls",
    FlatVelocity: "velocity must be as the latents",
    IntegerVelocity: "velocity must be of a floating dtype; got torch.int64",
    NonFiniteVelocity: "velocity must be finite",
    DetachedVelocity: "velocity must be with a gradient",
    RandomVelocity: "no dropout",
    MixesRows: "a row of velocity must be the same computed alone",
    DecodesChannelsLast: r"decode\(\) must be \[\d, 3, H, W\]",
    DecodesToBytes: r"decode\(\) must be of a floating dtype; got torch.uint8",
    DecodesFromMinusOne: r"decode\(\) must be in \[0, 1\]",
    DecodesWithoutClamping: r"decode\(\) must be in \[0, 1\]",
    DecodesWithGradient: r"decode\(\) must be detached",
    NormalisesOverTheBatch: "must be the same decoded alone",
    FlatLatents: r"encode_images\(\) must be as the latents",
    LatentsWithGradient: r"encode_images\(\) must be detached",
    DrawsItsLatents: r"encode_images\(\) must be the same for equal images",
    CentresLatents: "a latent must be the same encoded alone",
    EncodesAnySize: "a column short must be a ValueError",
    AdaptsNoLayer: "layers of the network .*got 'to_q'",
}


@pytest.mark.parametrize(("cls", "message"), FLOW.items(), ids=lambda each: str(each)[:40])
def test_broken_flow_pipeline_is_refused(cls: Callable[[], Any], message: str) -> None:
    broken = cls()
    if cls is not NetworkIsAFunction:
        trained(broken)
    with pytest.raises(AssertionError, match=message):
        check_pipeline(broken, prompts=DIRECTIONS)


# --------------------------------------------------------------------------- broken token pipelines


class Logits(ToyTokenPipeline):
    """A toy whose logits are changed by `change`."""

    def logits(
        self, network: nn.Module, tokens: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        return self.change(super().logits(network, tokens, conditioning), tokens)

    def change(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return logits


class LogitsOfTheLastPosition(Logits):
    def change(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return logits[:, -1]


class SeesThePresentToken(Logits):
    def change(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return logits + torch.nn.functional.one_hot(tokens, 16)


class StepsAnotherLaw(ToyTokenPipeline):
    def step(self, network: nn.Module, state: Any, tokens: Tensor) -> Tensor:
        return super().step(network, state, tokens.roll(1, 0))


class DrawsAPositionTwice(ToyTokenPipeline):
    groups = (torch.arange(2), *torch.arange(1, 16).split(1))


class MixesSequences(Logits):
    def change(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return logits - logits.mean(dim=0)


class RandomLogits(Logits):
    def change(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return torch.nn.functional.dropout(logits)


class DetachedLogits(Logits):
    def change(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return logits.detach()


class LogitsOfItsOwnNetwork(ToyTokenPipeline):
    def logits(
        self, network: nn.Module, tokens: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        return super().logits(self.network, tokens, conditioning)


TOKEN = {
    LogitsOfTheLastPosition: r"logits must be \[4, 16, V\]; got \(4, 16\)",
    SeesThePresentToken: "with other tokens from group 8 on",
    StepsAnotherLaw: r"step\(\) of group 1 .* in logits\(\) of the whole sequence",
    DrawsAPositionTwice: "groups must be of all positions 0 to 15, once",
    MixesSequences: "a row of logits must be the same computed alone",
    RandomLogits: "no dropout",
    DetachedLogits: "logits must be with a gradient",
    LogitsOfItsOwnNetwork: "one call of the network that it is given",
}


@pytest.mark.parametrize(("cls", "message"), TOKEN.items(), ids=lambda each: str(each)[:40])
def test_broken_token_pipeline_is_refused(cls: type[ToyTokenPipeline], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_pipeline(trained(cls()), prompts=SYMBOLS)


# --------------------------------------------------------------------------- broken policies


Drawn = tuple[Rollout, FlowTrajectory]


class DrawsFromTheGlobalState(FlowPolicy):
    def rollout(self, batch: PromptBatch, plan: Any) -> Drawn:
        return super().rollout(replace(batch, seed=int(torch.randint(1000, ()))), plan)


class DrawsSomethingElseEachTime(FlowPolicy):
    calls = 0

    def rollout(self, batch: PromptBatch, plan: Any) -> Drawn:
        self.calls += 1
        return super().rollout(replace(batch, seed=self.calls), plan)


class DrawsByPosition(FlowPolicy):
    def rollout(self, batch: PromptBatch, plan: Any) -> Drawn:
        return super().rollout(replace(batch, sample_id=torch.arange(len(batch))), plan)


class Undecoded(FlowPolicy):
    def rollout(self, batch: PromptBatch, plan: Any) -> Drawn:
        rollout, trajectory = super().rollout(batch, plan)
        return replace(rollout, decode=lambda x: rollout.decode(x) - 0.5), trajectory


class Stored(FlowPolicy):
    """A policy whose stored decisions are changed by `change`."""

    def rollout(self, batch: PromptBatch, plan: Any) -> Drawn:
        rollout, trajectory = super().rollout(batch, plan)
        decisions = replace(trajectory.decisions, **self.change(trajectory.decisions))
        trajectory.__dict__["decisions"] = decisions  # where cached_property keeps it
        return rollout, trajectory

    def change(self, decisions: Any) -> dict[str, Tensor]:
        raise NotImplementedError


class StoresHalfPrecision(Stored):
    def change(self, decisions: Any) -> dict[str, Tensor]:
        return {"old_log_prob": decisions.old_log_prob.bfloat16()}


class StoresInfinity(Stored):
    def change(self, decisions: Any) -> dict[str, Tensor]:
        return {"old_log_prob": decisions.old_log_prob * torch.inf}


class StoresAGraph(Stored):
    def change(self, decisions: Any) -> dict[str, Tensor]:
        return {"old_log_prob": decisions.old_log_prob.clone().requires_grad_()}


class StoresRowsThatAreNotThere(Stored):
    def change(self, decisions: Any) -> dict[str, Tensor]:
        return {"row": decisions.row + 1}


class StoresRowsBackwards(Stored):
    def change(self, decisions: Any) -> dict[str, Tensor]:
        return {"row": decisions.row.flip(0)}


class Scored(FlowPolicy):
    """A policy whose log-probs are changed by `change`."""

    def evaluate(self, trajectory: FlowTrajectory, index: Tensor) -> Evaluation:
        new = super().evaluate(trajectory, index)
        return replace(new, log_prob=self.change(new.log_prob))

    def change(self, log_prob: Tensor) -> Tensor:
        raise NotImplementedError


class ScoresAnotherTransition(Scored):
    def change(self, log_prob: Tensor) -> Tensor:
        return log_prob + 1e-3


class ScoresWithoutGradient(Scored):
    def change(self, log_prob: Tensor) -> Tensor:
        return log_prob.detach()


class ScoresWithAGradientOfNothing(Scored):
    def change(self, log_prob: Tensor) -> Tensor:
        return log_prob.detach() + torch.zeros((), requires_grad=True)


class ScoresInColumns(Scored):
    def change(self, log_prob: Tensor) -> Tensor:
        return log_prob[:, None]


class ScoresInHalfPrecision(Scored):
    def change(self, log_prob: Tensor) -> Tensor:
        return log_prob.bfloat16()


class ScoresByTheNumberScored(Scored):
    def change(self, log_prob: Tensor) -> Tensor:
        return log_prob + 0.01 * (len(log_prob) < 4)


POLICY = {
    DrawsFromTheGlobalState: "without torch's global random state",
    DrawsSomethingElseEachTime: "images must be the same for the same batch again",
    DrawsByPosition: "drawn with fewer neighbours",
    Undecoded: r"rollout\(\).images must be in \[0, 1\]",
    StoresHalfPrecision: "old_log_prob must be float32",
    StoresInfinity: "old_log_prob must be finite",
    StoresAGraph: "old_log_prob must be detached",
    StoresRowsThatAreNotThere: r"decisions.row must be in \[0",
    StoresRowsBackwards: "decisions.row must be ascending",
    ScoresAnotherTransition: r"the ratio on the first pass must be 1.*1.00e-03",
    ScoresWithoutGradient: r"evaluate\(\).log_prob must be with a gradient",
    ScoresWithAGradientOfNothing: r"must be in weights.trainable\(\)",
    ScoresInColumns: "must be as old_log_prob",
    ScoresInHalfPrecision: r"evaluate\(\).log_prob must be float32",
    ScoresByTheNumberScored: "the same scored in parts of 3",
}


@pytest.mark.parametrize(("cls", "message"), POLICY.items(), ids=lambda each: str(each)[:40])
def test_broken_policy_is_refused(cls: type[FlowPolicy], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(flow_policy(cls), batch(flow_prompts()), PLAN)


def test_a_plan_that_trains_nothing_is_refused() -> None:
    class NothingStored(Stored):
        def change(self, decisions: Any) -> dict[str, Tensor]:
            names = ("row", "sample", "old_log_prob", "mask", "sigma", "sigma_next")
            return {name: getattr(decisions, name)[:0] for name in names}

    with pytest.raises(AssertionError, match="one that trains a decision"):
        check_policy(flow_policy(NothingStored), batch(flow_prompts()), PLAN)


def test_one_group_is_enough_to_find_noise_by_position() -> None:
    alone = batch(flow_prompts(), num_groups=1)
    check_policy(flow_policy(), alone, PLAN)
    with pytest.raises(AssertionError, match="drawn with fewer neighbours"):
        check_policy(flow_policy(DrawsByPosition), alone, PLAN)


# --------------------------------------------------------------------------- broken rewards


class Good:
    """Mean intensity; what the rewards below break."""

    inputs: tuple[str, ...] = ("images",)
    scope = "sample"
    range = (0.0, 1.0)

    def score(self, *, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class NoRange(Good):
    range = property()  # type: ignore[assignment]


class ReadsDepth(Good):
    inputs = ("images", "depth")


class ScopeOfABatch(Good):
    scope = "batch"


class EmptyRange(Good):
    range = (1.0, 0.0)


class LeavesTheRange(Good):
    def score(self, *, images: Tensor) -> Tensor:
        return 100 * super().score(images=images)


class OneForAll(Good):
    def score(self, *, images: Tensor) -> Tensor:
        return images.mean()


class Integers(Good):
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=images).long()


class AList(Good):
    def score(self, *, images: Tensor) -> Any:
        return super().score(images=images).tolist()


class NeedsMoreThanItDeclares(Good):
    def score(self, *, images: Tensor, prompts: list[str]) -> Tensor:  # type: ignore[override]
        return super().score(images=images)


class Random(Good):
    def score(self, *, images: Tensor) -> Tensor:
        return torch.rand(len(images))


class Sorts(Good):
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=images).sort().values


class RanksTheBatch(Good):
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=images).argsort().argsort() / 10


class OneScorePerPrompt(Good):
    inputs = ("images", "prompts")

    def score(self, *, images: Tensor, prompts: list[str]) -> Tensor:  # type: ignore[override]
        by_prompt = dict(zip(prompts, super().score(images=images), strict=True))
        return torch.stack([by_prompt[prompt] for prompt in prompts])


class CannotScoreOne(Good):
    def score(self, *, images: Tensor) -> Tensor:
        if len(images) == 1:
            raise ValueError("needs two")
        return super().score(images=images)


class NoScoreAmongItsComponents(Good):
    def score(self, *, images: Tensor) -> Any:
        return {"brightness": super().score(images=images)}


class ComponentOfAnotherLength(Good):
    def score(self, *, images: Tensor) -> Any:
        return {"score": super().score(images=images), "red": images[:1, 0].mean().reshape(1)}


class ZeroForNaN(Good):
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=images).nan_to_num(0.0)


class OneNaNForAll(Good):
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=images) + 0 * images.sum()


class Smooth(Good):
    """Good, and says that its score has a gradient: it has."""

    differentiable = True


class EightBit(Smooth):
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=(images * 255).round() / 255)


class WithoutAGraph(Smooth):
    @torch.no_grad()
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=images)


class ThroughNumpy(Smooth):
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=torch.from_numpy(images.detach().numpy()))


class OfAWeightAlone(Smooth):
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=images.detach()) * torch.ones((), requires_grad=True)


class RootOfNothing(Smooth):
    def score(self, *, images: Tensor) -> Tensor:
        return super().score(images=images) + 0 * (images - images).sqrt().sum(dim=(1, 2, 3))


class Downhill(Smooth):
    """Its gradient is that of a loss."""

    def score(self, *, images: Tensor) -> Tensor:
        scores = super().score(images=images)
        return 2 * scores.detach() - scores


class ReadsNoTensor(Smooth):
    inputs = ("texts",)

    def score(self, *, texts: list[str]) -> Tensor:  # type: ignore[override]
        return torch.tensor([float(text.split()[1]) for text in texts]) / 10


REWARD = {
    EightBit: "must be not 0 everywhere; got 0 everywhere",
    WithoutAGraph: "must be part of torch's graph; got a detached tensor",
    ThroughNumpy: "must be part of torch's graph",
    OfAWeightAlone: "must be one in images; got none",
    RootOfNothing: "must be finite; got NaN or infinity",
    Downhill: "must be that of its score, so that a step along it raises the sum",
    ReadsNoTensor: "must be tensors among them; got texts",
    NoRange: "none of range",
    ReadsDepth: "declares the input 'depth'",
    ScopeOfABatch: "declares the scope 'batch'",
    EmptyRange: "which is empty",
    LeavesTheRange: r"declares the range \[0, 1\] but returned",
    OneForAll: "one value per sample, got shape",
    Integers: "use .float",
    AList: "got list",
    NeedsMoreThanItDeclares: "raised TypeError",
    Random: "the scores must be the same for the same batch again",
    Sorts: "with the batch backwards",
    RanksTheBatch: 'with scope "sample" the scores must be the same one by one',
    OneScorePerPrompt: "samples of one prompt must be the same one by one",
    CannotScoreOne: "a call with 1 samples must be answered; got ValueError: needs two",
    NoScoreAmongItsComponents: "must be called 'score'",
    ComponentOfAnotherLength: "as 'red', one value per sample",
    ZeroForNaN: "must be NaN .*; got 0",
    OneNaNForAll: "beside an image of NaN",
}


def test_the_unbroken_reward_conforms() -> None:
    check_reward(Good())
    check_reward(Smooth())


def test_a_gradient_may_be_in_films_or_latents_or_in_one_of_two_inputs() -> None:
    class Films(Smooth):
        inputs = ("videos", "prompts")

        def score(self, *, videos: Tensor, prompts: list[str]) -> Tensor:  # type: ignore[override]
            lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
            return videos.mean(dim=(1, 2, 3, 4)) * lengths / 100

    class Latents(Smooth):
        inputs = ("images", "latents")

        def score(self, *, images: Tensor, latents: Tensor) -> Any:  # type: ignore[override]
            scores = latents.mean(dim=(1, 2, 3)) + 0 * images.detach().mean(dim=(1, 2, 3))
            return {"score": scores, "again": scores.detach()}

    for cls in (Films, Latents):
        check_reward(cls())


@pytest.mark.parametrize(("cls", "message"), REWARD.items(), ids=lambda each: str(each)[:40])
def test_broken_reward_is_refused(cls: Callable[[], Any], message: str) -> None:
    with pytest.raises((AssertionError, RewardError), match=message):
        check_reward(cls())


def test_rewards_of_films_texts_and_latents_conform() -> None:
    class Films(Good):
        inputs = ("videos",)

        def score(self, *, videos: Tensor) -> Tensor:  # type: ignore[override]
            return videos.mean(dim=(1, 2, 3, 4))

    class Words(Good):
        inputs = ("texts",)

        def score(self, *, texts: list[str]) -> Any:  # type: ignore[override]
            digits = torch.tensor([float(text.split()[1]) for text in texts]) / 10
            return {"score": digits, "length": torch.tensor([float(len(text)) for text in texts])}

    class Latents(Good):
        inputs = ("latents",)

        def score(self, *, latents: Tensor) -> Tensor:  # type: ignore[override]
            return latents.mean(dim=(1, 2, 3))

    for cls in (Films, Words, Latents):
        check_reward(cls())


def test_a_group_reward_may_compare_its_samples() -> None:
    class Ranks(RanksTheBatch):
        scope = "group"

        def score(self, *, images: Tensor) -> Tensor:
            scores = super().score(images=images)
            return scores.where(images.mean(dim=(1, 2, 3)).isfinite(), torch.nan)

    check_reward(Ranks())


def test_one_broken_image_must_not_cost_a_whole_group() -> None:
    class SpoilsTheGroup(OneNaNForAll):
        scope = "group"

    with pytest.raises(AssertionError, match=r'"group" .* must be numbers still; got NaN for 3'):
        check_reward(SpoilsTheGroup())


def test_a_group_reward_is_given_samples_of_one_prompt() -> None:
    class NeedsOnePrompt(Good):
        inputs = ("images", "prompts")
        scope = "group"

        def score(self, *, images: Tensor, prompts: list[str]) -> Tensor:  # type: ignore[override]
            assert len(set(prompts)) == 1
            return super().score(images=images)

    check_reward(NeedsOnePrompt())
