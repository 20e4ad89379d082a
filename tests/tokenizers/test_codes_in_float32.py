"""Codes are told apart in float32, also under autocast; what is not used stays as it is."""

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis.published.codebook import CodeTable
from tokenizers_vis.quantizers.library import Lfq, Vq
from tokenizers_vis.quantizers.shared import SharedIndexVq
from tokenizers_vis.quantizers.stochastic import StochasticVq

NUM, DIM = 64, 4


def near_codes():
    """Unit codes whose cosines are 1 to within 1/256, the step of bfloat16 there."""
    noise = torch.randn(NUM, DIM, generator=torch.Generator().manual_seed(0))
    return F.normalize(torch.ones(DIM) + 0.05 * noise, dim=-1)


def table_of(kind):
    """A quantiser with these codes that sees its features as they are."""
    if kind == "vq":
        made = Vq(DIM, NUM, dim=DIM)
        made.table.codebook = near_codes()
    elif kind == "stochastic":
        made = StochasticVq(DIM, NUM, dim=DIM)
        made.codes.data = near_codes()
    elif kind == "shared":
        made = SharedIndexVq((DIM,), NUM)
        made.codes.data = near_codes()
    else:
        made = CodeTable(NUM, DIM, unit_length=True)
        made.embedding.weight.data = near_codes()
    if hasattr(made, "project"):
        made.project = torch.nn.Identity()
    return made.eval()


@pytest.mark.parametrize("kind", ["vq", "stochastic", "shared", "published"])
def test_the_nearest_code_is_found_under_autocast(kind):
    """Float32 tensors alone do not help: autocast makes their product bfloat16.

    Mutation: the product left to autocast.
    """
    made, features = table_of(kind), near_codes()[None]
    plain = made(features).ids
    assert torch.equal(plain, torch.arange(NUM)[None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(features).ids, plain)


def test_the_library_forgets_its_gradient_in_evaluation_and_we_do_not():
    """In both modes the value is the code to the last bit. Mutation: the library's embeddings."""
    for made in (Vq(8, 16, dim=4), Lfq(8, 4, group_bits=4)):
        for mode in (True, False):
            features = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
            features.requires_grad_()
            found = made.train(mode)(features)
            assert torch.equal(found.embeddings, made.embed(found.ids))
            (found.embeddings * torch.randn(found.embeddings.shape)).sum().backward()
            assert features.grad.any(dim=-1).all()


def dying(sample):
    """A table of +-x and +-y; code 0 is chosen, and dies in the same step if it learns."""
    made = Vq(2, 4, dim=2, dead_below=0.5, decay=0.9)
    made.project = torch.nn.Identity()
    made.table.codebook = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    made.table._codebook.cluster_size.fill_(0.1)
    features = torch.tensor([[[0.6, 0.8], [0.0, 1.0], [0.8, 0.6]]])
    return made, made.train()(features, sample=sample)


def test_features_are_pulled_to_the_code_that_was_chosen():
    """By hand: (.6, .8) and (0, 1) choose y, (.8, .6) chooses x; mean squares (.36 + .04) / 2 = .2,
    0 and (.04 + .36) / 2 = .2. Mutation: the codes as they are after the step, when dead ones lie
    on vectors of the batch."""
    torch.manual_seed(0)
    made, found = dying(sample=True)
    assert found.ids.tolist() == [[1, 1, 0]]
    assert not torch.equal(made.table.codebook[:2], torch.eye(2))  # it moved
    assert found.embeddings.tolist() == [[[0, 1], [0, 1], [1, 0]]]
    assert float(found.losses["commitment"].value) == pytest.approx(0.4 / 3)


def test_the_table_stands_still_without_a_sample():
    """Mutation: the library's own rule, which moves it whenever the module is in training mode."""
    made, _ = dying(sample=False)
    assert torch.equal(made.table.codebook[:2], torch.eye(2))


def test_masked_positions_are_zero_and_enter_nothing():
    made = Vq(2, 4, dim=2).eval()
    features = torch.randn(2, 3, 2, requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    found = made(features, mask=mask)
    assert not found.embeddings[~mask].any() and not found.ids[~mask].any()
    (found.embeddings.sum() + found.losses["commitment"].value).backward()
    assert not features.grad[~mask].any() and features.grad[mask].any()
