"""The block that everything here is built of: masks, places, modulation, cache."""

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis import blocks
from tokenizers_vis.blocks import (
    Block,
    Transformer,
    attend,
    causal_mask,
    image_to_patches,
    level_causal_mask,
    patches_to_image,
    rotate,
    rotation_of,
    time_embedding,
)
from tokenizers_vis.tokens import grid_layout, scale_layout


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
def test_plain_products_are_torchs_attention(masked, monkeypatch):
    query, key, value = (random(2, 3, 5, 8, seed=seed) for seed in range(3))
    mask = causal_mask(5) if masked else None
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(attend(query, key, value, mask), expected)
    monkeypatch.setattr(blocks, "_SHORT", 0)
    torch.testing.assert_close(attend(query, key, value, mask), expected)


def moved(transformer):
    """With modulation gates that are open, so that it does something."""
    for block in transformer.blocks:
        if block.modulation is not None:
            torch.nn.init.normal_(block.modulation.weight, std=0.5)
    return transformer.eval()


def test_a_position_changes_only_what_sees_it():
    """Mutation: a mask that is transposed, or not handed to a later block."""
    torch.manual_seed(0)
    transformer = Transformer(16, 2, num_heads=2).eval()
    x = random(1, 6, 16)
    before = transformer(x, mask=causal_mask(6))
    x[0, 3] += 1
    after = transformer(x, mask=causal_mask(6))
    changed = (before != after).any(-1)[0]
    assert changed.tolist() == [False] * 3 + [True] * 3


def test_coarse_levels_do_not_see_fine_ones():
    mask = level_causal_mask(scale_layout([1, 2]).level)
    assert mask[0].tolist() == [True] + [False] * 4
    assert mask[1:].all()


def test_a_cache_gives_what_a_whole_forward_gives():
    torch.manual_seed(0)
    transformer = moved(Transformer(16, 2, num_heads=2, condition_dim=8, rotary_axes=2))
    x, condition, coords = random(2, 4, 16), random(2, 8, seed=1), grid_layout(2, 2).coords[:, 1:]
    whole = transformer(x, mask=causal_mask(4), coords=coords, condition=condition)
    cache, steps = transformer.new_cache(), []
    for i in range(4):
        here = slice(i, i + 1)
        steps.append(transformer(x[:, here], coords=coords[here], condition=condition, cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-6, rtol=1e-5)
    for layer in cache:
        layer.crop(2)
    again = transformer(x[:, 2:3], coords=coords[2:3], condition=condition, cache=cache)
    torch.testing.assert_close(again, whole[:, 2:3], atol=1e-6, rtol=1e-5)


def test_a_modulated_block_begins_as_the_identity_and_modulates_by_kind():
    torch.manual_seed(0)
    block = Block(16, 2, condition_dim=8, num_kinds=2)
    x, condition, kind = random(1, 4, 16), random(1, 8, seed=1), torch.tensor([0, 0, 1, 1])
    assert torch.equal(block(x, condition=condition, kind=kind), x)
    with torch.no_grad():  # opens the gates of the second kind alone
        block.modulation.bias[6 * 16 :] = 1
    out = block(x, condition=condition, kind=kind)
    assert torch.equal(out[:, :2], x[:, :2]) and not torch.equal(out[:, 2:], x[:, 2:])
    with pytest.raises(ValueError, match="give a condition"):
        block(x)


def test_rotary_places_depend_on_distances_alone():
    """Theorem of RoPE: a shift of all places changes no product of a query and a key."""
    query, key = random(6, 16), random(6, 16, seed=1)
    coords = random(6, 2, seed=2)

    def products(places):
        rotation = rotation_of(places, 16)
        return rotate(query, rotation) @ rotate(key, rotation).T

    torch.testing.assert_close(products(coords), products(coords + 0.3), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(products(coords), products(2 * coords), atol=1e-2)


def test_a_position_without_a_place_is_not_rotated():
    query = random(2, 16)
    coords = torch.tensor([[0.25, 0.75], [float("nan")] * 2])
    turned = rotate(query, rotation_of(coords, 16))
    assert torch.equal(turned[1], query[1]) and not torch.equal(turned[0], query[0])
    torch.testing.assert_close(turned.norm(dim=-1), query.norm(dim=-1))
    with pytest.raises(ValueError, match="too narrow"):
        rotation_of(coords, 2)


def test_patches_go_row_by_row_and_back():
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = image_to_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[0, 1].reshape(3, 2, 2), images[0, :, :2, 2:4])
    assert torch.equal(patches_to_image(patches, 2, height=4, width=6), images)
    with pytest.raises(ValueError, match="does not divide"):
        image_to_patches(images, 4)


def test_times_have_distinct_embeddings_of_one_length():
    embedded = time_embedding(torch.tensor([0.0, 0.001, 1.0]), 8)
    assert embedded[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(embedded.square().sum(1), torch.full((3,), 4.0))
    assert (embedded[0] - embedded[1]).norm() > 0.5
