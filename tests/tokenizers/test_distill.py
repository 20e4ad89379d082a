"""Distillation: cosines by hand, where its gradient goes, and that it fits any tokenizer."""

import pytest
import torch

from tokenizers_vis.addons.bit_prior import BitPrior
from tokenizers_vis.addons.distill import Distill, cosine_distance, on_grid
from tokenizers_vis.addons.dropout import TokenDropout
from tokenizers_vis.addons.registry import make_addon
from tokenizers_vis.registry import make_tokenizer
from tokenizers_vis.tokenizer import TokenizerOutput
from tokenizers_vis.tokens import Tokens, grid_layout, register_layout
from tokenizers_vis.training import TokenizerTraining

SMALL = {"image_size": 16, "channels": (8, 16)}
FLEXTOK = {"image_size": 16, "patch_size": 4, "num_registers": 4, "dim": 32, "num_heads": 2,
           "encoder_depth": 1, "decoder_depth": 1}  # fmt: skip


def grid_teacher(images):
    """[B, 4, 3]: colours of a 2 x 2 grid."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2)


def global_teacher(images):
    """[B, 3]."""
    return images.mean((2, 3))


def output_of(tokens):
    return TokenizerOutput(tokens, {})


def drawn_tokens(layout, mask=None):
    generator = torch.Generator().manual_seed(0)
    length = layout.num_tokens
    embeddings = torch.randn(2, length, 3, generator=generator).requires_grad_()
    features = torch.randn(2, length, 3, generator=generator).requires_grad_()
    kept = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    return Tokens(embeddings, kept, layout, None, features)


def plain(teacher, **weights):
    """An add-on whose projections do nothing."""
    addon = Distill(teacher, **weights)
    for place, weight in addon.weights.items():
        if weight:
            addon.projections[place] = torch.nn.Identity()
    return addon


def losses(addon, tokens, images):
    return addon(images, output_of(tokens), progress=0.0, generator=None)


def test_cosine_distance_by_hand():
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    assert cosine_distance(x, y).tolist() == pytest.approx([0, 1, 2, 1 - 0.5**0.5])


def test_features_are_brought_to_the_tokens_grid_by_area():
    """4 x 4 numbers in rows: the mean of 0, 1, 4, 5 is 2.5. Mutation: a grid read by columns."""
    features = torch.arange(16.0).reshape(1, 16, 1)
    assert on_grid(features, grid_layout(2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert on_grid(features, grid_layout(4, 4)).flatten().tolist() == list(range(16))
    assert on_grid(features, grid_layout(1, 2)).flatten().tolist() == [6.5, 8.5]
    assert on_grid(features[:, :15], grid_layout(2, 2)) is None
    assert on_grid(features, register_layout(4, nested=True)) is None
    assert on_grid(features[:, 0], grid_layout(2, 2)) is None


def test_tokens_on_a_grid_are_taught_their_own_place():
    """The mean over places and images of 1 - cosine. Mutation: all places taught the mean."""
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    tokens = drawn_tokens(grid_layout(2, 2))
    found = losses(plain(grid_teacher, pre=0.25, post=0.5), tokens, images)
    target = grid_teacher(images)
    for place, source, weight in (("pre", tokens.features, 0.25), ("post", tokens.embeddings, 0.5)):
        cosine = (source * target).sum(-1) / source.norm(dim=-1) / target.norm(dim=-1)
        term = found[f"distill_{place}"]
        assert term.weight == weight
        torch.testing.assert_close(term.value, (1 - cosine).mean())


def test_registers_are_taught_as_a_whole_by_what_is_kept():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens = drawn_tokens(register_layout(3, nested=True), mask)
    for teacher in (grid_teacher, global_teacher):
        found = losses(plain(teacher, pre=0.0, post=1.0), tokens, images)["distill_post"].value
        kept = torch.stack([tokens.embeddings[0, :2].mean(0), tokens.embeddings[1, 0]])
        torch.testing.assert_close(found, cosine_distance(kept, global_teacher(images)).mean())


def test_gradients_go_where_they_must_and_nowhere_else():
    """Pre teaches features, post the tokens; none to what is dropped, none to the teacher."""
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    teacher = torch.nn.Conv2d(3, 3, 4, stride=4)
    addon = plain(lambda x: teacher(x).flatten(2).transpose(1, 2), pre=1.0, post=1.0)
    mask = torch.tensor([[True, True, True, True], [True, False, True, True]])
    for place, reached, other in (("pre", "features", "embeddings"),
                                  ("post", "embeddings", "features")):  # fmt: skip
        tokens = drawn_tokens(grid_layout(2, 2), mask)
        losses(addon, tokens, images)[f"distill_{place}"].value.backward()
        gradient = getattr(tokens, reached).grad.abs().sum(-1)
        assert torch.equal(gradient > 0, mask)
        assert getattr(tokens, other).grad is None
    assert teacher.weight.grad is None


def test_a_teacher_is_neither_trained_nor_saved():
    tokenizer = make_tokenizer("grid", {**SMALL, "vocab": 16})
    teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 8, stride=8), torch.nn.Flatten(2))
    addon = Distill(lambda images: teacher(images).transpose(1, 2))
    addon_of_module = Distill(teacher)
    training = TokenizerTraining(tokenizer, addons={"distill": addon, "again": addon_of_module})
    mine = {id(parameter) for parameter in teacher.parameters()}
    assert not mine & {id(parameter) for parameter in training.parameters()}
    assert not any("teacher" in name for name in training.state_dict())
    assert addon.projections["post"][-1].out_features == 5


CASES = {
    "vq": ("grid", {**SMALL, "vocab": 16}),
    "kl": ("grid", {**SMALL, "quantizer": "kl", "dim": 4}),
    "uniwetok": ("uniwetok", {**SMALL, "num_heads": 2, "num_bits": 8, "group_bits": 4}),
    "flextok": ("flextok", FLEXTOK),
}


@pytest.mark.parametrize("teacher", [grid_teacher, global_teacher])
@pytest.mark.parametrize("case", CASES)
def test_it_composes_with_any_tokenizer(case, teacher):
    """And each of its losses alone reaches every weight that makes the tokens."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(*CASES[case])
    state = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    dropout = TokenDropout() if len(tokenizer.token_counts) > 1 else None
    addon = Distill(teacher, hidden=8)
    training = TokenizerTraining(tokenizer, dropout=dropout, addons={"distill": addon})
    assert tokenizer.training
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, state[name]), f"attaching changed {name}"
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(0)
    output = training(images, progress=0.5, generator=generator)
    encoder = list(tokenizer.encoder.parameters())
    for place in ("pre", "post"):
        term = output.losses[f"distill_{place}"]
        assert 0 <= float(term.value.detach()) <= 2
        found = torch.autograd.grad(term.value, encoder, retain_graph=True, allow_unused=True)
        assert all(each is not None and bool(each.any()) for each in found)


def test_a_configuration_names_it_and_its_teacher():
    addon = make_addon("distill", {"teacher": "torch:clone", "pre": 0.0})
    images = torch.rand(2, 3)
    assert torch.equal(addon.features(images), images)
    assert isinstance(make_addon("bit_prior", {"weight": 0.1}), BitPrior)


def test_refusals():
    with pytest.raises(ValueError, match="needs a weight"):
        Distill(grid_teacher, pre=0.0, post=0.0)
    for place in ("torch:no_such_function", "no.such.module:f", ":f"):
        with pytest.raises(ValueError, match="distill: teacher must be"):
            Distill(place)
    tokenizer = make_tokenizer("grid", {**SMALL, "vocab": 16})
    with pytest.raises(ValueError, match="a teacher gives features"):
        TokenizerTraining(tokenizer, addons={"distill": Distill(lambda images: images)})
