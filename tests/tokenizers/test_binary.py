"""Grouped binary tokens: exact ids, exact entropies, and the conflict that SigLu ends."""

import itertools
import math

import pytest
import torch
from vector_quantize_pytorch import LFQ

from tokenizers_vis.bits import bits_of, number_of
from tokenizers_vis.quantizers.binary import GroupedBinary, siglu


def quantizer(num_bits=6, group_bits=3, **args):
    """A quantiser that sees its features as they are: no norm, no projection."""
    made = GroupedBinary(num_bits, num_bits, group_bits=group_bits, **args)
    made.project = torch.nn.Identity()
    return made


def test_siglu_is_a_hyperbolic_tangent_of_half():
    """Mutation: tanh(x) instead of tanh(x / 2)."""
    x = torch.linspace(-8, 8, 65, dtype=torch.float64)
    torch.testing.assert_close(siglu(x), 2 * torch.sigmoid(x) - 1, atol=1e-14, rtol=0)
    # (e - 1) / (e + 1) at 1, by hand
    assert float(siglu(torch.ones(1, dtype=torch.float64))) == pytest.approx(0.46211715726000976)


def test_ids_have_the_first_bit_lowest_group_by_group():
    """By hand: + - + is 1 + 4 = 5, - + + is 2 + 4 = 6. Mutation: the highest bit first."""
    x = torch.tensor([[[0.3, -0.2, 0.1, -0.9, 0.8, 2.0]]])
    found = quantizer(bound="none")(x)
    assert found.ids.tolist() == [[[5, 6]]]
    assert found.embeddings.tolist() == [[[1, -1, 1, -1, 1, 1]]]


@pytest.mark.parametrize("group_bits", [1, 3, 8, 12])
def test_every_token_of_a_group_is_its_number_and_back(group_bits):
    """Bit-exact over the whole vocabulary, in the last of two groups."""
    made = quantizer(2 * group_bits, group_bits, bound="none")
    ids = torch.arange(2**group_bits)[None, :, None].repeat(1, 1, 2)
    ids[..., 0] = 0
    bits = made.embed(ids)
    assert torch.equal(bits.abs(), torch.ones_like(bits))
    assert torch.equal(made(bits).ids, ids)
    assert torch.equal(made(bits).embeddings, bits)
    assert len(torch.unique(bits[0], dim=0)) == 2**group_bits


def test_the_library_numbers_bits_the_other_way_round():
    """vq-pytorch's LFQ: same signs, ids of reversed groups; so ids are not interchangeable."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    library = LFQ(dim=8, codebook_size=16, num_codebooks=2, keep_num_codebooks_dim=True).eval()
    bits, ids, _ = library(x)
    ours = quantizer(8, 4, bound="none")(x)
    assert torch.equal(ours.embeddings, bits)
    assert not torch.equal(ours.ids, ids)
    turned = number_of(ours.embeddings.unflatten(-1, (2, 4)).flip(-1))
    assert torch.equal(turned, ids)


def test_zero_is_a_bit():
    """torch.sign(0) = 0 is no corner; both inference codes say -1. Mutation: torch.sign."""
    for bound in ("siglu", "none"):
        found = quantizer(bound=bound)(torch.zeros(1, 1, 6))
        assert found.embeddings.tolist() == [[[-1.0] * 6]]
        assert found.ids.tolist() == [[[0, 0]]]
    assert quantizer()(torch.full((1, 1, 6), -0.0)).ids.tolist() == [[[0, 0]]]


def test_128_bits_need_no_table_of_2_to_the_128():
    made = GroupedBinary(16, 128, group_bits=8)
    found = made(torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0)))
    assert found.ids.shape == (1, 2, 16)
    assert made.codebook.bits == 128
    assert max(buffer.numel() for buffer in made.buffers()) == 256 * 8
    assert torch.equal(made.embed(found.ids), found.embeddings.detach())
    with pytest.raises(ValueError, match="groups of 1 to 12 bits"):
        GroupedBinary(16, 128, group_bits=128)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_factorised_entropies_are_those_of_the_enumerated_corners(temperature):
    """softmax(2 x . c / T) over all corners, in Python. Mutation: 2 x instead of 4 x in a logit."""
    x = torch.empty(2, 3, 2, 3).uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    sure, diverse = quantizer(temperature=temperature).entropies(x, mask)
    corners = [torch.tensor(c) for c in itertools.product([-1.0, 1.0], repeat=3)]
    each, means = [], torch.zeros(2, 8, dtype=torch.float64)
    for b, t, g in itertools.product(range(2), range(3), range(2)):
        if not mask[b, t]:
            continue
        weight = [math.exp(2 * float(x[b, t, g] @ c) / temperature) for c in corners]
        p = torch.tensor(weight, dtype=torch.float64) / sum(weight)
        each.append(float(-(p * p.log()).sum()))
        means[g] += p / 4  # 4 tokens count
    assert float(sure) == pytest.approx(sum(each) / 8, rel=1e-5)
    assert float(diverse) == pytest.approx(float(-(means * means.log()).sum(1).mean()), rel=1e-5)


def test_entropies_at_the_extremes():
    """Undecided bits: 3 log 2 both. All corners equally often and surely: 0 and 3 log 2."""
    made = quantizer(3, 3, temperature=0.01)
    sure, diverse = made.entropies(torch.zeros(1, 4, 1, 3), None)
    assert float(sure) == pytest.approx(3 * math.log(2)) == pytest.approx(float(diverse))
    corners = bits_of(torch.arange(8), 3)[None, :, None]
    sure, diverse = made.entropies(corners, None)
    assert float(sure) == pytest.approx(0, abs=1e-6)
    assert float(diverse) == pytest.approx(3 * math.log(2))


def test_masked_tokens_have_no_gradient_and_no_say():
    made = quantizer(commitment=1.0, bound="none")
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    found = made(x, mask=mask)
    sum(term.weighted for term in found.losses.values()).backward()
    assert float(x.grad[~mask].abs().max()) == 0
    assert float(x.grad[mask].abs().min()) > 0


def test_entropies_are_float32_under_autocast():
    """Mutation: without the guard the matrix product is bfloat16."""
    made = quantizer(16, 8)
    x = torch.empty(2, 8, 2, 8).uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    plain = made.entropies(x, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made.entropies(x, None)
    assert [float(value) for value in cast] == [float(value) for value in plain]


def gradients(bound, raw):
    """d(entropy) and d(commitment) by what stands before the bound."""
    found = []
    for name in ("entropy", "commitment"):
        x = raw.clone().requires_grad_()
        made = quantizer(1, 1, bound=bound, diversity=0.0, entropy=1.0, commitment=1.0)
        made(x.reshape(1, -1, 1)).losses[name].value.backward()
        found.append(x.grad)
    return found


def test_entropy_and_commitment_oppose_each_other_only_without_siglu():
    """On a grid: with SigLu both push outward everywhere; without it they conflict beyond 1.

    Mutation: the bound left out.
    """
    raw = torch.tensor([-3.0, -1.7, -1.2, -0.8, -0.3, -0.01, 0.01, 0.3, 0.8, 1.2, 1.7, 3.0])
    entropy, commitment = gradients("siglu", raw)
    assert bool((entropy.sign() == -raw.sign()).all())  # descent moves |raw| up
    assert bool((commitment.sign() == -raw.sign()).all())
    entropy, commitment = gradients("none", raw)
    assert bool((entropy.sign() == -raw.sign()).all())
    beyond = raw.abs() > 1
    assert bool((commitment.sign()[beyond] == raw.sign()[beyond]).all())
    assert bool((commitment.sign()[~beyond] == -raw.sign()[~beyond]).all())


def test_the_straight_through_gradient_passes_siglu():
    """d bit / d raw = (1 - tanh^2(raw / 2)) / 2: .5 at 0."""
    x = torch.tensor([[[1e-6, 2.0, -2.0, 0.5, -0.5, 1.0]]], requires_grad=True)
    quantizer()(x).embeddings.sum().backward()
    expected = (1 - torch.tanh(x.detach() / 2) ** 2) / 2
    torch.testing.assert_close(x.grad, expected)
    assert float(x.grad[0, 0, 0]) == pytest.approx(0.5)
