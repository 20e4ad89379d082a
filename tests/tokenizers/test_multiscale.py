"""Shared-index codebooks and residual scales, by numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis.quantizers.multiscale import MultiScale
from tokenizers_vis.quantizers.shared import SharedIndexVq


def two_parts(weights):
    """Three codes; of the vector (1, 0 | 1, 0) the cosines are 1, 0, .71 and 0, 1, -1."""
    table = SharedIndexVq((2, 2), 3, weights=weights)
    root = math.sqrt(0.5)
    codes = [[1.0, 0, 0, 5], [0, 1, 2, 0], [root, root, -1, 0]]
    table.codes.data = torch.tensor(codes)
    return table


VECTOR = torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])


# Scores: 1, w, .71 - w. Mutation: one weight for both parts (w ignored), or lengths in the choice
# (code 1's pixel part is 2 long, so that it would win with w = .7).
@pytest.mark.parametrize(("w", "chosen"), [(0.0, 0), (0.7, 0), (2.0, 1), (math.inf, 1)])
def test_the_weighted_sum_of_both_distances_chooses(w, chosen):
    assert two_parts((1.0, w)).nearest(VECTOR).item() == chosen


def test_ranks_say_where_the_code_stands_for_either_part():
    table = two_parts((1.0, 0.5))
    ranks = table.ranks(VECTOR, table.nearest(VECTOR))
    # Code 0 is the nearest semantically; of three pixel codes, code 1 is nearer.
    assert ranks["rank_0"] == 0
    assert ranks["rank_1"].item() == pytest.approx(1 / 3)


def test_codes_are_looked_up_at_their_own_length():
    table = two_parts((1.0, 0.5))
    assert table(VECTOR).embeddings.tolist() == [[[1.0, 0.0, 0.0, 5.0]]]


@pytest.mark.parametrize("weights", [(1.0, -0.5), (0.0, 0.0)])
def test_weights_without_meaning_are_refused(weights):
    with pytest.raises(ValueError, match="weights of parts"):
        SharedIndexVq((2, 2), 3, weights=weights)


def test_a_weight_for_every_part():
    with pytest.raises(ValueError, match="2 parts need as many weights"):
        SharedIndexVq((2, 2), 3, weights=(1.0,))


# Must verify (a). Mutation: normalise the whole code and not every part.
@pytest.mark.parametrize(("weights", "part"), [((0.0, 1.0), 1), ((1.0, math.inf), 1), ((1, 0), 0)])
def test_a_part_with_all_the_weight_makes_the_ids_of_that_part_alone(weights, part):
    generator = torch.Generator().manual_seed(0)
    both = MultiScale(SharedIndexVq((6, 3), 40, weights=weights), (1, 2, 4))
    alone = MultiScale(SharedIndexVq(((6, 3)[part],), 40), (1, 2, 4))
    alone.table.codes.data = both.table.parts(both.table.codes.data)[part].clone()
    features = torch.randn(5, 16, 9, generator=generator)
    own = both.table.parts(features)[part]
    assert torch.equal(both(features).ids, alone(own).ids)


def test_a_huge_weight_is_as_good_as_infinite():
    features = torch.randn(5, 16, 9, generator=torch.Generator().manual_seed(0))
    ids = []
    for weights in ((1.0, 1e6), (1.0, math.inf)):
        torch.manual_seed(0)
        ids.append(MultiScale(SharedIndexVq((6, 3), 40, weights=weights), (1, 2, 4))(features).ids)
    assert torch.equal(*ids)


def signs(**kwargs):
    """A table of +2 and -1: the sign of a number chooses."""
    table = SharedIndexVq((1,), 2)
    table.codes.data = torch.tensor([[2.0], [-1.0]])
    return MultiScale(table, (1, 2), **kwargs)


FEATURES = torch.tensor([[4.0, 1.0, -1.0, -2.0]])[..., None]


def test_what_a_scale_leaves_is_what_the_next_one_quantises():
    found = signs()(FEATURES)
    # Mean .5 -> +2; residual 2, -1, -3, -4 -> +2, -1, -1, -1. Mutation: quantise the features at
    # every scale (ids 0 0 0 1 1).
    assert found.ids.tolist() == [[0, 0, 1, 1, 1]]
    assert found.features.flatten().tolist() == [0.5, 2, -1, -3, -4]
    assert found.embeddings.flatten().tolist() == [2, 2, -1, -1, -1]
    assert signs().assemble(found.embeddings).flatten().tolist() == [4, 1, 1, 1]


def test_losses_are_of_the_sum_so_far_averaged_over_scales():
    losses = signs()(FEATURES).losses
    # Sum 2 2 2 2: squares 4 1 9 16, mean 7.5. Sum 4 1 1 1: squares 0 0 4 9, mean 3.25.
    for name, weight in (("codebook", 1.0), ("commitment", 0.25)):
        assert losses[name].weight == weight
        assert losses[name].value.item() == pytest.approx(5.375)


def test_the_codebook_loss_moves_codes_and_commitment_features():
    quantizer, features = signs(), FEATURES.clone().requires_grad_()
    losses = quantizer(features).losses
    losses["codebook"].value.backward(retain_graph=True)
    assert features.grad is None
    # d/dc of (7.5 + 3.25) / 2: scale 1 has code 0 everywhere, 2/4 sum(2 - f) = 3; in scale 2 code 0
    # is in every sum, and once more in the first: 2/4 (0 + 0 + 2 + 3 + 0) = 2.5; code 1: 2.5.
    assert quantizer.table.codes.grad.flatten().tolist() == pytest.approx([2.75, 1.25])
    quantizer.table.codes.grad = None
    losses["commitment"].value.backward()
    assert quantizer.table.codes.grad is None
    # d/df = 2/4 (f - sum), averaged: (f - 2 2 2 2 + f - 4 1 1 1) / 4.
    assert features.grad.flatten().tolist() == pytest.approx([0.5, -0.25, -1.25, -1.75])


def test_gradients_telescope_to_the_identity():
    torch.manual_seed(0)
    quantizer = MultiScale(SharedIndexVq((4, 3), 20), (1, 2, 3, 5))
    features = torch.randn(2, 25, 7, requires_grad=True)
    pull = torch.randn(2, 25, 7)
    found = quantizer(features)
    (quantizer.assemble(found.embeddings) * pull).sum().backward()
    # Mutation: take the hard code off the residual; the coarse part then counts several times.
    assert torch.allclose(features.grad, pull, atol=1e-5)


def test_a_prefix_passes_the_gradient_of_what_it_can_say():
    torch.manual_seed(0)
    quantizer = MultiScale(SharedIndexVq((4,), 20), (2, 4))
    features = torch.randn(1, 16, 4, requires_grad=True)
    mask = torch.arange(20)[None] < 4
    pull = torch.randn(1, 16, 4)
    found = quantizer(features)
    (quantizer.assemble(found.embeddings, mask) * pull).sum().backward()
    smooth = features.detach().clone().requires_grad_()
    grid = smooth.transpose(1, 2).unflatten(2, (4, 4))
    pooled = F.avg_pool2d(grid, 2)
    large = F.interpolate(pooled, scale_factor=2, mode="bicubic").flatten(2).transpose(1, 2)
    (large * pull).sum().backward()
    assert torch.allclose(features.grad, smooth.grad, atol=1e-5)


def test_ids_lead_to_the_embeddings_bit_by_bit():
    torch.manual_seed(0)
    quantizer = MultiScale(SharedIndexVq((4, 3), 20), (1, 2, 4))
    found = quantizer(torch.randn(2, 16, 7))
    assert torch.equal(quantizer.embed(found.ids), found.embeddings)


def test_scale_dropout_silences_one_scale_of_an_image_in_training_only():
    torch.manual_seed(0)
    quantizer = MultiScale(SharedIndexVq((4,), 20), (1, 2, 4), scale_dropout=1.0)
    quantizer.table.dead_below = 0.0
    features = torch.randn(64, 16, 4)
    level = torch.arange(3).repeat_interleave(torch.tensor([1, 4, 16]))
    found = quantizer(features, sample=True, generator=torch.Generator().manual_seed(0))
    is_silent = (found.embeddings == 0).all(-1)
    per_scale = torch.stack([is_silent[:, level == n].all(1) for n in range(3)], 1)
    assert (per_scale.sum(1) == 1).all()
    assert per_scale.any(0).all()  # any scale, not always the same
    # Without its first scale an image shows the second one everything. Mutation: drop from the sum
    # alone, and take the code off the residual all the same.
    first = per_scale[:, 0]
    pooled = F.avg_pool2d(features.transpose(1, 2).unflatten(2, (4, 4)), 2).flatten(2)
    assert torch.allclose(found.features[first][:, 1:5], pooled.transpose(1, 2)[first], atol=1e-6)
    assert not (quantizer(features).embeddings == 0).all(-1).any()
    assert not (quantizer.eval()(features, sample=True).embeddings == 0).all(-1).any()


def test_dead_codes_are_placed_on_vectors_of_the_batch_and_living_ones_stay():
    table = SharedIndexVq((2, 1), 4)
    codes = torch.tensor([[1.0, 0, 1], [0, 1, 1], [-1, 0, 1], [0, -1, 1]])
    table.codes.data = codes.clone()
    table.used.copy_(torch.tensor([1.0, 1.0, 0.0, 0.051]))
    vectors = torch.tensor([[2.0, 0.1, 7], [3.0, 0.2, 8]])
    table.observe(vectors, torch.tensor([0, 0]), generator=torch.Generator().manual_seed(0))
    # Averages: .99 + .02, .99, 0 -> dead, .0505 -> alive; two choices of code 0.
    assert table.used.tolist() == pytest.approx([1.01, 0.99, 1.0, 0.05049])
    assert torch.equal(table.codes[[0, 1, 3]], codes[[0, 1, 3]])
    # All parts from the same vector.
    assert table.codes[2].tolist() in vectors.tolist()


def test_a_mask_and_descending_scales_are_refused():
    table = SharedIndexVq((2,), 4)
    with pytest.raises(ValueError, match="whole grids"):
        MultiScale(table, (1, 2))(torch.zeros(1, 4, 2), mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="must ascend"):
        MultiScale(table, (2, 1))


# Mutation: count or average over all positions.
def test_masked_positions_enter_neither_losses_nor_counts():
    table = SharedIndexVq((1,), 2)
    table.codes.data = torch.tensor([[2.0], [-1.0]])
    features = torch.tensor([[[3.0], [-9.0]], [[1.0], [-9.0]]])
    found = table(features, mask=torch.tensor([[True, False]] * 2), sample=True)
    assert found.losses["codebook"].value.item() == pytest.approx(1.0)  # (3 - 2)^2, (1 - 2)^2
    assert table.used[0].item() == pytest.approx(0.02)
    assert table.codes[1].item() in (3.0, 1.0)  # dead: on a vector that counts
