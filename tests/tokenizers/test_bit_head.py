"""The binary diffusion head: exact formulas, an exact sampler, and joint bits on a toy."""

import itertools
import math

import pytest
import torch

from tokenizers_vis.bit_head import (
    BitHead,
    bit_diffusion_loss,
    bit_sigmas,
    bit_transition,
    draw_sigma,
    flip_bits,
    sample_bits,
)

CORNERS = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))
EVEN = CORNERS.prod(-1) > 0  # an even number of -1
# Even parity, and not all alike: bits that no product of marginals describes.
LAW = torch.tensor([0, 0.4, 0.3, 0, 0.2, 0, 0, 0.1])


def posterior_mean(x_t, sigma):
    """E[x0 given x_t] under LAW: softmax(log p + t x_t . c / sigma^2), t = 1 - sigma."""
    level = sigma[..., None]
    scores = LAW.log() + (1 - level) * (x_t @ CORNERS.T) / level.square()
    return torch.softmax(scores, -1) @ CORNERS


def frequencies(bits):
    number = ((bits > 0).long() * torch.tensor([4, 2, 1])).sum(-1)
    return torch.bincount(number, minlength=8) / len(bits)


def test_the_law_is_one():
    assert float(LAW.sum()) == pytest.approx(1.0)
    assert bool((LAW[~EVEN] == 0).all())


def test_loss_by_hand():
    """Error .5 at sigma .5 is 1 as a velocity; at sigma .01 it counts as at .05: (.5 / .05)^2.

    Mutation: the square of the bits' error alone, or no lower bound.
    """
    bits = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    sigma = torch.tensor([0.5, 0.01])
    seen = []

    def predict(x_t, level):
        seen.append(x_t)
        return bits + torch.tensor([0.5, -0.5])

    loss = bit_diffusion_loss(predict, bits, sigma, torch.zeros(2, 2))
    assert loss.tolist() == pytest.approx([1.0, 100.0])
    torch.testing.assert_close(seen[0], (1 - sigma[:, None]) * bits)


def test_the_transition_is_velocity_and_score():
    """In the paper's t = 1 - sigma, from its own formulas. Mutation: the score's sign."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    x0 = torch.tanh(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    t, dt = 0.4, 0.05
    velocity = (x0 - x) / (1 - t)
    score = (t * velocity - x) / (1 - t)
    mean, std = bit_transition(x, x0, 1 - t, 1 - t - dt)
    torch.testing.assert_close(mean, x + dt * (velocity + (1 - t) * score))
    assert float(std) == pytest.approx(math.sqrt(2 * (1 - t) * dt))


def test_the_noise_levels():
    sigmas = bit_sigmas(19)
    assert len(sigmas) == 21
    assert sigmas[[0, -2, -1]].tolist() == pytest.approx([1.0, 0.05, 0.0])
    torch.testing.assert_close(sigmas[:-1].diff(), torch.full((19,), -0.05))
    with pytest.raises(ValueError, match="at least 1 step"):
        bit_sigmas(0)


def test_drawn_levels_are_logit_normal_towards_noise():
    """The paper's t has logit N(-.8, .8^2), so sigma's is N(.8, .8^2). Mutation: the sign."""
    logit = torch.logit(draw_sigma((20_000,), generator=torch.Generator().manual_seed(0)))
    assert float(logit.mean()) == pytest.approx(0.8, abs=0.02)
    assert float(logit.std()) == pytest.approx(0.8, abs=0.02)


def test_the_sampler_draws_the_law_when_the_prediction_is_exact():
    """TV to the law: .5 of Bernoulli bits with the same marginals, here that of 20 steps.

    The floor of 8,000 draws is about .007. Mutation: the score's sign, or the noise left out.
    """
    generator = torch.Generator().manual_seed(0)
    found = frequencies(sample_bits(posterior_mean, (8_000, 3), num_steps=100, generator=generator))
    assert float((found - LAW).abs().sum() / 2) < 0.03
    marginal = (LAW[:, None] * (CORNERS > 0)).sum(0)
    independent = torch.where(CORNERS > 0, marginal, 1 - marginal).prod(-1)
    assert float((independent - LAW).abs().sum() / 2) > 0.4


def test_the_number_of_evaluations_and_the_last_sign():
    calls = []

    def predict(x_t, sigma):
        calls.append(float(sigma.flatten()[0]))
        return torch.full_like(x_t, 0.0)

    bits = sample_bits(predict, (2, 3), num_steps=4, generator=torch.Generator().manual_seed(0))
    assert calls == pytest.approx(bit_sigmas(4)[:-1].tolist())
    assert torch.equal(bits, -torch.ones(2, 3))


def test_the_sign_of_the_best_prediction_is_that_of_the_posterior_mean():
    """The loss is least at the posterior mean: x-prediction leaves the minimiser where it is.

    Monte Carlo over corners at one x_t; Mutation: a loss that is not a square.
    """
    x_t, sigma = torch.tensor([0.3, -0.2, 0.1]), torch.tensor(0.6)
    mean = posterior_mean(x_t[None], sigma[None])[0]
    scores = LAW.log() + 0.4 * (CORNERS @ x_t) / 0.36
    weight = torch.softmax(scores, -1)
    guess = torch.zeros(3, requires_grad=True)
    x1 = (x_t - 0.4 * CORNERS) / 0.6  # the noise that leads every corner to x_t
    loss = bit_diffusion_loss(lambda seen, _: guess.expand_as(seen), CORNERS, sigma.expand(8), x1)
    (gradient,) = torch.autograd.grad((weight * loss).sum(), guess)
    # Of a quadratic with curvature 2 / (3 sigma^2) the minimum is one Newton step away.
    torch.testing.assert_close(-gradient * 3 * 0.36 / 2, mean)


def test_the_head_learns_a_parity_that_no_product_of_bits_can_have():
    """4 bits, the condition says which parity: independent bits are right half of the time."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = BitHead(4, 2, dim=48, depth=2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    steps = 500
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)

    def conditions(parity):
        return torch.stack([parity, -parity], -1)

    for _ in range(steps):
        bits = torch.randint(0, 2, (128, 4), generator=generator) * 2.0 - 1
        loss = head.loss(bits, conditions(bits.prod(-1)), generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    parity = torch.ones(1000).index_fill(0, torch.arange(500), -1.0)
    drawn = head.sample(conditions(parity), generator=generator)
    assert float((drawn.prod(-1) == parity).float().mean()) > 0.85
    used = torch.unique(drawn, dim=0)
    assert len(used) == 16  # and it has not settled on one corner
    # Near the data the prediction is the data: t -> 1 of the paper's convention.
    near = torch.full((1000,), 0.02)
    predicted = head(drawn, near, conditions(parity)).detach()
    assert float((predicted - drawn).abs().mean()) < 0.2


def test_the_loss_teaches_who_made_the_bits_and_the_condition():
    head = BitHead(4, 3, dim=16, depth=2, num_modulations=2)
    torch.nn.init.normal_(head.out.weight)
    torch.nn.init.normal_(head.last_modulation.weight)
    bits = torch.ones(2, 5, 4, requires_grad=True)
    condition = torch.randn(2, 5, 3, requires_grad=True)
    values = head.loss(bits, condition, repeats=3, generator=torch.Generator().manual_seed(0))
    assert values.shape == (2, 5)
    values[0, 1].backward()
    for each in (bits.grad, condition.grad):
        reached = each.abs().sum(-1) > 0
        assert reached.nonzero().tolist() == [[0, 1]]


def test_guidance_is_linear_in_the_prediction():
    """Scale 1 ignores the unconditional; scale 0 is the unconditional."""
    torch.manual_seed(1)
    head = BitHead(4, 3, dim=16, depth=1)
    for layer in (head.out, head.last_modulation, head.modulations[0]):
        torch.nn.init.normal_(layer.weight)
    first, second = torch.randn(50, 3), torch.randn(50, 3)

    def drawn(condition, scale, unconditional):
        generator = torch.Generator().manual_seed(2)
        return head.sample(condition, guidance_scale=scale, unconditional=unconditional,
                           num_steps=3, generator=generator)  # fmt: skip

    assert torch.equal(drawn(first, 0.0, second), drawn(second, 1.0, None))
    assert not torch.equal(drawn(first, 1.0, None), drawn(second, 1.0, None))
    with pytest.raises(ValueError, match="unconditional"):
        drawn(first, 2.0, None)


def test_modulations_are_shared_by_blocks_in_a_row():
    head = BitHead(4, 3, dim=16, depth=6, num_modulations=2)
    assert len(head.modulations) == 2
    assert len(head.mlps) == 6
    with pytest.raises(ValueError, match="do not divide"):
        BitHead(4, 3, depth=3, num_modulations=2)


def test_bits_are_flipped_at_the_rate():
    bits = torch.ones(100, 100)
    flipped = flip_bits(bits, 0.1, generator=torch.Generator().manual_seed(0))
    assert float((flipped < 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(flip_bits(bits, 0.0), bits)
    with pytest.raises(ValueError, match="rate"):
        flip_bits(bits, 1.5)
