"""HieraTok: scale-causal attention, prefixes of scales, and what trains them."""

import pytest
import torch

from tokenizers_vis.registry import make_tokenizer

ARGS = {
    "image_size": 16, "patch_size": 4, "scales": (1, 2, 4), "latent_dim": 4, "dim": 32,
    "num_heads": 2, "encoder_depth": 1, "scale_depth": 2, "decoder_depth": 2,
}  # fmt: skip


def hieratok(**args):
    torch.manual_seed(0)
    return make_tokenizer("hieratok", {**ARGS, **args}).eval()


def images(num=3):
    return torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_token_sees_its_scale_and_coarser_ones():
    tokenizer = hieratok(image_size=8, scales=(1, 2))
    wanted = [[1, 0, 0, 0, 0]] + [[1, 1, 1, 1, 1]] * 4
    assert tokenizer.mask.int().tolist() == wanted


# Must verify (a). Mutation: no mask, or the mask transposed.
@pytest.mark.parametrize("part", ["scale_encoder", "decoder"])
def test_coarse_outputs_do_not_depend_on_fine_inputs_and_fine_ones_do_on_coarse(part):
    tokenizer = hieratok()
    trunk = getattr(tokenizer, part)
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(2))

    def outputs(inputs):
        return trunk(inputs, mask=tokenizer.mask, coords=tokenizer.coords)

    plain = outputs(x)
    for start, end in ((0, 1), (1, 5), (5, 21)):
        changed = x.clone()
        changed[:, start:end] *= -1  # a constant would not survive the norm
        found = outputs(changed)
        assert torch.equal(found[:, :start], plain[:, :start])
        assert ((found - plain)[:, start:].abs().amax((0, 2)) > 1e-4).all()


# The mask is used where it counts: tokens and images. Mutation: call the trunk without it.
def test_the_image_of_a_prefix_is_the_same_whatever_the_finer_tokens_are():
    tokenizer = hieratok()
    tokens = tokenizer.encode(images())
    changed = tokens.embeddings.clone()
    changed[:, 5:] += 1
    hidden, other = tokenizer.hidden(tokens), tokenizer.hidden(type(tokens)(
        changed, tokens.mask, tokens.layout))  # fmt: skip
    assert torch.equal(hidden[:, :5], other[:, :5])
    assert not torch.equal(hidden[:, 5:], other[:, 5:])


def test_the_coarse_tokens_of_the_encoder_do_not_see_the_fine_ones():
    tokenizer = hieratok()
    coarse = tokenizer.encode(images()).embeddings[:, :5]
    with torch.no_grad():
        tokenizer.scale_embedding[2] += 1  # changes the fine scale's inputs alone
    changed = tokenizer.encode(images()).embeddings
    assert torch.equal(changed[:, :5], coarse)


# Mutation: read out the finest scale whatever was kept.
def test_gradients_of_a_prefix_end_at_its_last_token():
    tokenizer = hieratok()
    for count, start in ((1, 0), (5, 1), (21, 5)):
        tokens = tokenizer.encode(images())
        tokens.embeddings.retain_grad()
        tokenizer.decode(tokens.keep(count)).sum().backward()
        size = tokens.embeddings.grad.abs().sum((0, 2))
        assert (size[:count] > 0).all()
        assert (size[count:] == 0).all()
        assert size[start] > 0


def test_a_scale_that_is_there_in_part_is_not_looked_at():
    tokenizer = hieratok()
    tokens = tokenizer.encode(images())
    assert torch.equal(tokenizer.decode(tokens.keep(4)), tokenizer.decode(tokens.keep(1)))
    lengths = torch.tensor([1, 5, 20])
    mixed = tokenizer.decode(tokens.keep(lengths))
    for row, count in enumerate((1, 5, 5)):
        alone = tokenizer.decode(tokens.keep(count))[row]
        assert torch.allclose(mixed[row], alone, atol=1e-6)


# Mutation: weigh a scale that was dropped, or leave the mean over scales out.
def test_auxiliary_loss_is_the_mean_error_of_the_coarse_images_that_are_kept():
    tokenizer = hieratok()
    tokenizer.patch_out.weight.data *= 0.1
    kept = torch.tensor([1, 5, 21])
    output = tokenizer(images(), num_tokens=kept, generator=torch.Generator().manual_seed(0))
    errors = {}
    for count in (1, 5):
        drawn = tokenizer.decode(output.tokens.keep(count))
        assert drawn.min() > 0 and drawn.max() < 1  # decode's clamp did nothing
        errors[count] = (drawn - images()).square().mean((1, 2, 3))
    wanted = (errors[1].sum() + errors[5][1:].sum()) / 5
    found = output.losses["auxiliary"]
    assert found.value.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert found.weight == 0.5
    whole = tokenizer.decode(output.tokens)
    assert torch.allclose(output.reconstruction, whole, atol=1e-6)


def test_one_scale_is_the_plain_tokenizer():
    tokenizer = hieratok(scales=(4,))
    assert tokenizer.token_counts == (16,)
    assert tokenizer.mask.all()
    assert set(tokenizer(images()).losses) == {"pixel_l1", "pixel_l2", "kl"}


def test_latents_are_drawn_in_training_and_means_otherwise():
    tokenizer = hieratok()
    drawn = tokenizer(images(), generator=torch.Generator().manual_seed(0)).tokens.embeddings
    mean = tokenizer.encode(images()).embeddings
    assert (drawn - mean).abs().mean() > 0.1
    assert tokenizer.encode(images()).ids is None


@pytest.mark.parametrize("args", [{"scales": (1, 2)}, {"image_size": 18}, {"scales": ()}])
def test_scales_that_do_not_end_at_the_patches_are_refused(args):
    with pytest.raises(ValueError, match="must be the grid of patches"):
        hieratok(**args)
