"""The token policy: it scores what it drew, and a sample is the same in any company.

Kills, among others: the temperature missing in drawing or in scoring; noise drawn per batch; a
log-prob kept from the sampler's own logits; a network that sees the token that it predicts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowrl.data.sampler import GroupSampler
from flowrl.errors import ConfigError, DataError
from flowrl.functional.tokens import inverse_cdf
from flowrl.methods.spec import TokenPlan
from flowrl.policies.token import Sampling, TokenPolicy
from flowrl.policies.weights import FullWeights
from flowrl.toys import NUM_SYMBOLS, ToyTokenPipeline, token_prompts
from flowrl.types import PromptBatch

PLAN = TokenPlan()


def policy(
    *,
    rollout_batch_size: int = 7,
    decode_batch_size: int = 5,
    temperature: float = 0.8,
    **sampling: Any,
) -> TokenPolicy:
    """On a network whose logits are spread as a trained one's."""
    pipeline = ToyTokenPipeline(seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in pipeline.network.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return TokenPolicy(
        pipeline,
        FullWeights(pipeline.network, with_reference=False),
        sampling=Sampling(temperature=temperature, **sampling),
        rollout_batch_size=rollout_batch_size,
        decode_batch_size=decode_batch_size,
        device="cpu",
    )


def batch(rank: int = 0, world_size: int = 1, num_groups: int = 4) -> PromptBatch:
    sampler = GroupSampler(
        token_prompts(),
        num_groups=num_groups,
        group_size=6,
        updates_per_rollout=2,
        seed=0,
        shuffle=True,
        rank=rank,
        world_size=world_size,
    )
    return sampler(3)


def test_ratio_is_exactly_one_on_the_first_pass() -> None:
    drawn = policy(rollout_batch_size=24)
    _, trajectory = drawn.rollout(batch(), PLAN)
    new = drawn.evaluate(trajectory, torch.arange(24))
    assert torch.equal(new.log_prob, trajectory.decisions.old_log_prob)
    assert new.log_prob.requires_grad and new.log_prob.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 5, 24])
def test_ratio_is_one_however_rollout_and_training_are_cut(size: int) -> None:
    drawn = policy()
    _, trajectory = drawn.rollout(batch(), PLAN)
    old = trajectory.decisions.old_log_prob
    for start in range(0, 24, size):
        index = torch.arange(start, min(start + size, 24))
        log_ratio = drawn.evaluate(trajectory, index).log_prob - old[index]
        assert log_ratio.abs().max() < 2e-6
    assert old.std() > 0.5  # not a network for which every token is as likely


def test_the_trajectory_is_a_row_and_a_decision_per_sample() -> None:
    rollout, trajectory = policy().rollout(batch(), PLAN)
    decisions = trajectory.decisions
    assert trajectory.num_rows == 24 and trajectory.tokens.shape == (24, 16)
    assert decisions.row.tolist() == decisions.sample.tolist() == list(range(24))
    assert decisions.old_log_prob.shape == (24, 16) and decisions.mask.all()
    assert decisions.sigma.isnan().all() and decisions.sigma_next.isnan().all()
    assert rollout.images.shape == (24, 3, 4, 4)
    assert torch.equal((rollout.images[:, 0].flatten(1) * 15).round().long(), trajectory.tokens)


@pytest.mark.parametrize("rollout_batch_size", [1, 5, 24])
def test_tokens_do_not_depend_on_how_the_batch_is_cut(rollout_batch_size: int) -> None:
    reference, trajectory = policy(rollout_batch_size=7, decode_batch_size=24).rollout(
        batch(), PLAN
    )
    other = policy(rollout_batch_size=rollout_batch_size, decode_batch_size=1)
    rollout, cut = other.rollout(batch(), PLAN)
    assert torch.equal(cut.tokens, trajectory.tokens)
    assert torch.equal(rollout.images, reference.images)


def test_tokens_do_not_depend_on_the_world_size() -> None:
    _, alone = policy().rollout(batch(), PLAN)
    for rank in range(3):
        part = batch(rank, 3)
        _, trajectory = policy().rollout(part, PLAN)
        assert torch.equal(trajectory.tokens, alone.tokens[part.sample_id])


def test_samples_of_a_group_differ_and_the_same_batch_draws_the_same() -> None:
    first = policy().rollout(batch(), PLAN)[1].tokens
    assert len(first.unique(dim=0)) == 24
    assert torch.equal(first, policy().rollout(batch(), PLAN)[1].tokens)


def test_network_evaluations_are_counted_as_they_happen() -> None:
    drawn = policy()
    rows = 0

    def count(_: object, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    drawn.pipeline.network.register_forward_pre_hook(count)
    rollout, trajectory = drawn.rollout(batch(), PLAN)
    assert rollout.network_evals == rows == 24 * (16 + 1)
    rows = 0
    assert drawn.sample(batch(), num_steps=1, guidance_scale=1.0).network_evals == 24 * 16
    assert rows == 24 * 16
    rows = 0
    drawn.evaluate(trajectory, torch.arange(24))
    assert rows == trajectory.num_rows


def test_sample_draws_what_rollout_draws_and_neither_keeps_a_graph() -> None:
    drawn = policy()
    rollout, trajectory = drawn.rollout(batch(), PLAN)
    sampled = drawn.sample(batch(), num_steps=1, guidance_scale=1.0)
    assert torch.equal(sampled.images, rollout.images)
    assert not sampled.images.requires_grad
    assert not trajectory.decisions.old_log_prob.requires_grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_distribution_that_scores_them(temperature: float) -> None:
    # E[log p(token)] under p is minus the entropy, at every position: a sampler at another
    # temperature, or with biased noise, breaks it.
    drawn = policy(rollout_batch_size=600, temperature=temperature)
    _, trajectory = drawn.rollout(batch(num_groups=100), PLAN)
    with torch.no_grad():
        new = drawn.evaluate(trajectory, torch.arange(600))
    assert new.entropy is not None
    gap = new.log_prob + new.entropy
    assert abs(gap.mean()) < 4 * gap.std() * gap.numel() ** -0.5


def test_evaluate_gives_log_prob_and_entropy_of_the_softmax_at_temperature() -> None:
    drawn = policy(temperature=2.0)
    _, trajectory = drawn.rollout(batch(), PLAN)
    index = torch.tensor([2, 9])
    new = drawn.evaluate(trajectory, index)
    texts = [trajectory.batch.prompts[i].text for i in index.tolist()]
    tokens = trajectory.tokens[index]
    logits = drawn.pipeline.logits(drawn.pipeline.network, tokens, drawn.pipeline.encode(texts))
    probs = torch.softmax(logits / 2.0, dim=-1)
    assert new.entropy is not None
    torch.testing.assert_close(new.entropy, -(probs * probs.log()).sum(-1))
    torch.testing.assert_close(new.log_prob, probs.gather(-1, tokens[..., None]).squeeze(-1).log())


def test_the_toys_logits_are_causal() -> None:
    drawn = policy()
    pipeline, network = drawn.pipeline, drawn.pipeline.network
    tokens = torch.randint(NUM_SYMBOLS, (2, 16), generator=torch.Generator().manual_seed(0))
    conditioning = pipeline.encode(["symbol 3", "symbol 9"])
    logits = pipeline.logits(network, tokens, conditioning)
    for position in range(16):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % NUM_SYMBOLS
        difference = (pipeline.logits(network, changed, conditioning) - logits).abs().amax((0, 2))
        assert not difference[: position + 1].any()
        assert position == 15 or difference[position + 1] > 1e-3


def test_the_untrained_toy_draws_uniformly() -> None:
    pipeline = ToyTokenPipeline()
    logits = pipeline.logits(
        pipeline.network, torch.zeros(1, 16, dtype=torch.int64), pipeline.encode(["symbol 0"])
    )
    assert not logits.any()


def test_inverse_cdf_by_hand() -> None:
    # Probabilities 0, 1/2, 0, 1/4, 1/4, 0: forbidden tokens are never drawn, at either end.
    logits = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]]).log2().mul(torch.tensor(2.0).log())
    levels = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-24])
    drawn = inverse_cdf(logits.expand(6, -1), levels, 1.0)
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4]
    # At temperature 1/2 the probabilities are squared: 2/3, 1/6, 1/6.
    levels = torch.tensor([0.66, 0.67, 0.83, 0.84])
    assert inverse_cdf(logits.expand(4, -1), levels, 0.5).tolist() == [1, 3, 3, 4]


def test_the_highest_uniform_number_never_draws_past_the_last_possible_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 16, generator=generator)
    logits[:, -1] = -torch.inf
    drawn = inverse_cdf(logits, torch.full((20_000,), 1 - 2**-24), 1.0)
    assert drawn.max() == 14


def test_precomputed_prompts_draw_the_same_and_are_all_that_is_known(tmp_path: Path) -> None:
    texts = sorted({prompt.text for prompt in batch().prompts})
    expected = policy().rollout(batch(), PLAN)[1].tokens
    for folder in (None, tmp_path, tmp_path):
        drawn = policy()
        drawn.precompute(texts, folder)
        assert torch.equal(drawn.rollout(batch(), PLAN)[1].tokens, expected)


def test_evaluate_calls_the_training_network_and_rollout_the_plain_one() -> None:
    # A distributed run puts DDP's wrapper there; drawing through it would wait for other ranks.
    drawn = policy()
    _, trajectory = drawn.rollout(batch(), PLAN)
    drawn.training_network = ToyTokenPipeline().network  # draws uniformly
    uniform = drawn.evaluate(trajectory, torch.arange(3)).log_prob
    torch.testing.assert_close(uniform, torch.full((3, 16), 1 / 16).log())
    assert torch.equal(drawn.rollout(batch(), PLAN)[1].tokens, trajectory.tokens)


def test_saving_writes_the_weights_in_use(tmp_path: Path) -> None:
    drawn = policy()
    drawn.save(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in drawn.weights.network.state_dict().items():
        assert torch.equal(stored[name], value)


GUIDED = [
    {"guidance_scale": 3.0},
    {"guidance_scale": 3.0, "guidance_schedule": "linear", "temperature": 0.5},
    {"guidance_scale": 2.0, "guidance_schedule": "cosine"},
    {"guidance_scale": 3.0, "log_prob": "conditional"},
]


@pytest.mark.parametrize("sampling", GUIDED, ids=str)
def test_ratio_is_one_with_guidance_however_it_is_cut(sampling: dict[str, Any]) -> None:
    drawn = policy(**sampling)
    rollout, trajectory = drawn.rollout(batch(), PLAN)
    old = trajectory.decisions.old_log_prob
    index = torch.arange(24)
    new = torch.cat([drawn.evaluate(trajectory, part).log_prob for part in index.split(5)])
    assert (new - old).abs().max() < 2e-6
    other = policy(**sampling, rollout_batch_size=24)
    assert torch.equal(other.rollout(batch(), PLAN)[1].tokens, trajectory.tokens)
    rows = 2 * 16 + (1 if sampling.get("log_prob") else 2)
    assert rollout.network_evals == 24 * rows


def test_guided_tokens_are_drawn_from_the_law_that_scores_them() -> None:
    drawn = policy(rollout_batch_size=1200, guidance_scale=2.0, guidance_schedule="linear")
    _, trajectory = drawn.rollout(batch(num_groups=100), PLAN)
    with torch.no_grad():
        new = drawn.evaluate(trajectory, torch.arange(600))
    assert new.entropy is not None
    gap = new.log_prob + new.entropy
    assert abs(gap.mean()) < 4 * gap.std() * gap.numel() ** -0.5


def test_conditional_log_probs_are_of_the_law_without_guidance() -> None:
    drawn = policy(guidance_scale=3.0, log_prob="conditional")
    _, trajectory = drawn.rollout(batch(), PLAN)
    guided = policy(guidance_scale=3.0).rollout(batch(), PLAN)[1]
    assert torch.equal(guided.tokens, trajectory.tokens)  # drawn from the same law
    plain = policy().evaluate(trajectory, torch.arange(24)).log_prob
    assert torch.equal(plain, drawn.evaluate(trajectory, torch.arange(24)).log_prob)
    difference = guided.decisions.old_log_prob - trajectory.decisions.old_log_prob
    assert difference.abs().max() > 0.1


def test_guided_logits_are_u_plus_s_times_c_minus_u_at_every_step() -> None:
    drawn = policy(guidance_scale=3.0, guidance_schedule="linear", temperature=1.0)
    _, trajectory = drawn.rollout(batch(), PLAN)
    index = torch.tensor([2, 9])
    pipeline, tokens = drawn.pipeline, trajectory.tokens[index]
    texts = [trajectory.batch.prompts[i].text for i in index.tolist()]
    with_prompt = pipeline.logits(pipeline.network, tokens, pipeline.encode(texts))
    without = pipeline.logits(pipeline.network, tokens, pipeline.encode(["", ""]))
    scale = 1 + 2 * torch.arange(16)[:, None] / 15
    logits = without + scale * (with_prompt - without)
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(drawn.evaluate(trajectory, index).log_prob, expected)


def test_sample_takes_the_evaluations_guidance_and_one_is_none() -> None:
    plain, guided = policy(), policy(guidance_scale=3.0)
    with_scale = plain.sample(batch(), num_steps=1, guidance_scale=3.0)
    assert torch.equal(with_scale.images, guided.rollout(batch(), PLAN)[0].images)
    assert with_scale.network_evals == 24 * 32
    without = guided.sample(batch(), num_steps=1, guidance_scale=1.0)
    assert torch.equal(without.images, plain.rollout(batch(), PLAN)[0].images)


def test_a_temperature_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature must be positive, got 0"):
        policy(temperature=0.0)
    with pytest.raises(DataError, match="did you mean 'symbol 1'"):
        ToyTokenPipeline().encode(["symbl 1"])
