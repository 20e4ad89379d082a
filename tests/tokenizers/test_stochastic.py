"""LARP's stochastic VQ: its draws, its limits, where its gradients go."""

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis.quantizers.stochastic import StochasticVq, draw_ids


def plain_quantizer(codes, temperature=0.5):
    """Without a projection: features are what is compared."""
    vocab, dim = codes.shape
    quantizer = StochasticVq(dim, vocab, dim=dim, temperature=temperature)
    quantizer.project = torch.nn.Identity()
    quantizer.codes = torch.nn.Parameter(codes)
    return quantizer


CODES = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0], [0.5, 0.5]])


def test_codes_are_drawn_as_often_as_the_softmax_of_their_cosines_says():
    # Kills: unnormalised codes (the second would be drawn three times too often), T ignored.
    num = 20_000
    features = torch.tensor([3.0, 1.0]).expand(1, num, 2)
    drawn = plain_quantizer(CODES)(
        features, sample=True, generator=torch.Generator().manual_seed(0)
    ).ids
    frequency = torch.bincount(drawn.flatten(), minlength=4) / num
    # cosines of (3, 1) / sqrt 10: .94868, .31623, -.94868, and (3 + 1) / sqrt 20 = .89443
    scores = torch.tensor([0.94868, 0.31623, -0.94868, 0.89443])
    expected = torch.softmax(scores / 0.5, 0)
    floor = 0.5 * (2 * expected * (1 - expected) / (torch.pi * num)).sqrt().sum()
    assert 0.5 * (frequency - expected).abs().sum() < 4 * floor


def test_a_cold_draw_and_the_deterministic_choice_are_the_nearest_code():
    # Kills: argmin for argmax, cosines against raw features of another code order.
    torch.manual_seed(1)
    codes, features = torch.randn(16, 4), torch.randn(2, 50, 4)
    quantizer = plain_quantizer(codes, temperature=1e-4)
    unit, table = F.normalize(features, dim=-1), F.normalize(codes, dim=-1)
    nearest = torch.cdist(unit, table.expand(2, -1, -1)).argmin(-1)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(quantizer(features, sample=False).ids, nearest)
    assert torch.equal(quantizer(features, sample=True, generator=generator).ids, nearest)
    assert float(quantizer(features).metrics["nearest_code"]) == 1


def test_its_losses_are_the_two_halves_of_the_squared_error():
    # z = (.6, .8), nearest code (.5, .5) -> (.70711, .70711); error per channel:
    # (.10711^2 + .09289^2) / 2 = (.011472 + .008629) / 2 = .010051
    features = torch.tensor([[[3.0, 4.0]]], requires_grad=True)
    quantizer = plain_quantizer(CODES)
    found = quantizer(features)
    assert found.ids.tolist() == [[3]]
    for name in ("commitment", "codebook"):
        assert float(found.losses[name].value.detach()) == pytest.approx(0.010051, abs=1e-6)
    # Kills: a detach on the wrong side.
    found.losses["commitment"].value.backward(retain_graph=True)
    assert quantizer.codes.grad is None and features.grad.any()
    features.grad = None
    found.losses["codebook"].value.backward()
    assert features.grad is None
    moved = quantizer.codes.grad.any(1)
    assert moved.tolist() == [False, False, False, True]


def test_the_decoders_gradient_passes_to_the_features_and_not_to_the_codes():
    features = torch.tensor([[[3.0, 4.0]]], requires_grad=True)
    quantizer = plain_quantizer(CODES)
    found = quantizer(features)
    found.embeddings[..., 0].sum().backward()
    assert quantizer.codes.grad is None
    # d z_0 / d x of z = x / |x|, |x| = 5, z = (.6, .8): (1 - .36) / 5 and -.48 / 5
    assert features.grad.flatten().tolist() == pytest.approx([0.128, -0.096])
    assert torch.equal(found.embeddings, quantizer.embed(found.ids))


def test_masked_tokens_enter_no_loss():
    features = torch.tensor([[[3.0, 4.0], [-1.0, 0.0]]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    found = plain_quantizer(CODES)(features, mask=mask)
    assert float(found.losses["commitment"].value.detach()) == pytest.approx(0.010051, abs=1e-6)
    found.losses["commitment"].value.backward()
    assert not features.grad[0, 1].any()


def test_a_draw_never_takes_what_has_no_probability_and_repeats_with_its_seed():
    probability = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).expand(4000, 5)
    draws = [draw_ids(probability, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert set(draws[0].tolist()) == {1, 3}


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="positive"):
        StochasticVq(4, 8, dim=2, temperature=0)
