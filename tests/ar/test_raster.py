"""The raster generator: causal, the same with a cache, and a law that is drawn as it is scored.

Kills, among others: a token that sees itself; a cache with the places of the step before; words
that see tokens; guidance at the wrong scale; a row that depends on its neighbours.
"""

import itertools

import pytest
import torch

from flowrl.methods.spec import TokenPlan
from flowrl.policies.token import Sampling, TokenPolicy
from flowrl.policies.weights import FullWeights
from flowrl.testing import check_pipeline, check_policy
from flowrl.types import Prompt, PromptBatch
from pipelines.ar.pipeline import Autoregressive
from pipelines.ar.raster import Raster, RasterConfig
from tests.ar.toys import toy_model
from tokenizers_vis.tokens import Codebook, Segment, TokenLayout

PROMPTS = ("a photo of a red circle", "a photo of two stars", "a photo of a blue ring")


def batch(num: int, *, seed: int = 0) -> PromptBatch:
    return PromptBatch.one_group([Prompt(PROMPTS[i % 3]) for i in range(num)], seed=seed)


def policy(pipeline, **sampling) -> TokenPolicy:
    return TokenPolicy(
        pipeline,
        FullWeights(pipeline.network, with_reference=False),
        sampling=Sampling(**sampling),
        rollout_batch_size=64,
        decode_batch_size=64,
        device="cpu",
    )


def test_it_is_a_token_pipeline():
    check_pipeline(Autoregressive.of(toy_model()), prompts=PROMPTS)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7}, {"guidance_scale": 3.0},
     {"guidance_scale": 3.0, "guidance_schedule": "linear", "temperature": 0.7},
     {"guidance_scale": 3.0, "log_prob": "conditional"}],
    ids=str,
)  # fmt: skip
def test_its_policy_can_be_trained_under_every_sampling(sampling):
    check_policy(policy(Autoregressive.of(toy_model()), **sampling), batch(6), TokenPlan())


def test_every_logit_depends_on_the_tokens_before_and_the_words_and_on_nothing_else():
    pipeline = Autoregressive.of(toy_model())
    tokens = torch.randint(11, (1, 16), generator=torch.Generator().manual_seed(0))
    text = pipeline.words([PROMPTS[0]])
    with torch.no_grad():
        logits = pipeline.network(tokens, text)
        for position in range(16):
            changed = tokens.clone()
            changed[0, position] = (changed[0, position] + 1) % 11
            moved = (pipeline.network(changed, text) - logits).abs().amax((0, 2)) > 1e-5
            assert moved.tolist() == [False] * (position + 1) + [True] * (15 - position)
        others = pipeline.network(tokens, pipeline.words([PROMPTS[1]]))
        assert ((others - logits).abs().amax((0, 2)) > 1e-5).all()


def test_the_cache_gives_what_a_whole_forward_gives():
    network = toy_model().generator
    tokens = torch.randint(11, (3, 16), generator=torch.Generator().manual_seed(0))
    text = torch.randint(30, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = network(tokens, text)
        state = network.start(text)
        steps = torch.cat([network.step(state, tokens) for _ in range(16)], dim=1)
        ahead = tokens.clone()
        state, drawn = network.start(text), []
        for position in range(16):  # what is not drawn yet may be anything
            ahead[:, position:] = 0
            drawn.append(network.step(state, ahead))
            ahead[:, position] = tokens[:, position]
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(drawn, dim=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_drawn_follows_the_enumerated_law(guidance):
    torch.manual_seed(0)
    model = toy_model()
    layout = TokenLayout((Segment("register", (3,)),))
    config = RasterConfig(num_words=40, text_length=12, dim=16, depth=2, num_heads=2)
    generator = Raster(config, layout, Codebook("vq", 4, 3)).eval()
    for parameter in generator.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape)
    pipeline = Autoregressive.of(model)
    pipeline.network, pipeline.groups, pipeline.num_tokens = generator, generator.order.groups, 3
    sampled = policy(pipeline, guidance_scale=guidance)
    num = 6000
    many = PromptBatch.one_group([Prompt(PROMPTS[0])] * num, seed=3)
    _, trajectory = sampled.rollout(many, TokenPlan())
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        given, none = (
            generator(every, pipeline.words([text]).expand(27, -1)) for text in (PROMPTS[0], "")
        )
        log_probs = (none + guidance * (given - none)).log_softmax(-1)
        law = log_probs.gather(-1, every[..., None]).sum((1, 2)).exp()
    assert float(law.sum()) == pytest.approx(1, abs=1e-4)
    number = (trajectory.tokens * torch.tensor([9, 3, 1])).sum(1)
    count = torch.bincount(number, minlength=27)
    chi = ((count - num * law).square() / (num * law)).sum()
    assert float(chi) < 26 + 4 * (2 * 26) ** 0.5  # mean and spread of chi square
    assert float((law - 1 / 27).abs().max()) > 0.02  # not the uniform law
