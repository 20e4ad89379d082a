"""LARP's and TiTok's shared parts: patches of images and clips, places, what tokens see."""

import pytest
import torch

from tokenizers_vis.blocks import image_to_patches
from tokenizers_vis.holistic import Patches, sincos_places
from tokenizers_vis.registry import make_tokenizer

TINY = {
    "image_size": 16, "patch_size": 8, "num_tokens": 4, "vocab": 32, "code_dim": 4, "dim": 32,
    "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1,
}  # fmt: skip


def larp(**changes):
    torch.manual_seed(0)
    return make_tokenizer("larp", {**TINY, **changes}).eval()


def test_patches_of_an_image_are_those_of_the_blocks_and_join_again():
    images = torch.rand(2, 3, 12, 8)
    patches = Patches((3, 12, 8), 4)
    assert patches.grid == (1, 3, 2)
    assert torch.equal(patches.cut(images), image_to_patches(images, 4))
    assert torch.equal(patches.join(patches.cut(images)), images)


def test_a_patch_of_a_clip_is_a_block_of_frames_and_pixels():
    # Kills: frames and rows exchanged in either permutation.
    clips = torch.rand(2, 4, 3, 16, 24)
    patches = Patches((4, 3, 16, 24), 8, frames=2)
    cut = patches.cut(clips)
    assert patches.grid == (2, 2, 3) and cut.shape == (2, 12, 2 * 3 * 64) == (2, 12, patches.dim)
    # Patch 6 + 2 of frames first, then rows, then columns: frames 2 and 3, top right.
    assert torch.equal(cut[0, 8], clips[0, 2:4, :, :8, 16:].flatten())
    assert torch.equal(patches.join(cut), clips)


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        Patches((3, 3, 8, 8), 4, frames=2)
    with pytest.raises(ValueError, match="do not divide"):
        larp(patch_size=5)


def test_every_place_of_a_grid_has_its_own_wave():
    places = sincos_places((2, 3, 4), 24)
    distance = torch.cdist(places, places) + torch.eye(24)
    assert distance.min() > 0.1
    # One axis, width 4: frequencies 1 and 1/100; place 1 = sin 1, sin .01, cos 1, cos .01.
    expected = [0.841471, 0.01, 0.540302, 0.99995]
    assert sincos_places((2,), 4)[1].tolist() == pytest.approx(expected, abs=1e-5)
    # An axis of one place takes no channels from the others.
    assert torch.equal(sincos_places((1, 3, 4), 24), sincos_places((3, 4), 24))


def test_every_token_sees_the_whole_sample_and_every_pixel_sees_every_token():
    # Holistic: Kills a causal or local mask in either transformer.
    tokenizer = larp(num_frames=4, patch_frames=2)
    clips = torch.rand(1, *tokenizer.sample_shape, requires_grad=True)
    features = tokenizer.encode(clips).features
    for token in features[0]:
        (seen,) = torch.autograd.grad(token.square().sum() + token[0], clips, retain_graph=True)
        assert seen.flatten(2).any(2).all()
    tokens = tokenizer.encode(clips)
    embeddings = tokens.embeddings.detach().requires_grad_()
    drawn = tokenizer.decoder(embeddings, tokens.mask)
    for pixel in (drawn[0, 0, 0, 0, 0], drawn[0, 3, 2, 15, 15]):
        (seen,) = torch.autograd.grad(pixel, embeddings, retain_graph=True)
        assert seen.any(2).all()


def test_a_nested_one_ignores_what_was_dropped_and_another_refuses_prefixes():
    tokenizer = larp(nested=True)
    images = torch.rand(2, 3, 16, 16)
    assert tokenizer.token_counts == (1, 2, 3, 4) and tokenizer.layout.nested
    output = tokenizer(
        images, num_tokens=torch.tensor([1, 4]), generator=torch.Generator().manual_seed(0)
    )
    seen = torch.autograd.grad(output.reconstruction.sum(), output.tokens.embeddings)[0].any(2)
    assert seen.tolist() == [[True, False, False, False], [True] * 4]
    with pytest.raises(ValueError, match="keeps 4 tokens"):
        larp().encode(images, 2)


def test_sampled_tokens_follow_their_generator_and_the_plain_ones_need_none():
    tokenizer = larp(temperature=1.0)
    images = torch.rand(8, 3, 16, 16)

    def drawn(seed):
        return tokenizer.encode(
            images, sample=True, generator=torch.Generator().manual_seed(seed)
        ).ids

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert torch.equal(tokenizer.encode(images).ids, tokenizer.encode(images).ids)


def test_larps_numbers_are_the_papers():
    """tau = .03; L_vq = .25 |z - sg q|^2 + |sg z - q|^2 with weight .1. Mutation: either weight."""
    tokenizer = larp()
    losses = tokenizer(torch.rand(2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).losses
    found = {name: losses[name].weight for name in ("commitment", "codebook", "pixel_l1")}
    assert found == pytest.approx({"commitment": 0.025, "codebook": 0.1, "pixel_l1": 1.0})
    assert tokenizer.quantizer.temperature == 0.03


def test_the_two_differ_in_their_quantiser_and_loss_alone():
    a = {name: p.shape for name, p in larp().named_parameters() if "quantizer" not in name}
    titok = make_tokenizer("titok", TINY)
    b = {name: p.shape for name, p in titok.named_parameters() if "quantizer" not in name}
    assert a == b
    images = torch.rand(2, 3, 16, 16)
    used = {
        name: {key for key, term in each(images).losses.items() if term.weight > 0}
        for name, each in (("larp", larp()), ("titok", titok))
    }
    assert used == {
        "larp": {"pixel_l1", "commitment", "codebook"},
        "titok": {"pixel_l2", "commitment"},
    }
