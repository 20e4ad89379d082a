"""UniWeTok and BitDance's tokenizer: sizes, places, registers, style, noise."""

import pytest
import torch

from tokenizers_vis.hybrid import AdaptiveGroupNorm, GridAttention, HybridDecoder
from tokenizers_vis.registry import make_tokenizer

SMALL = {"image_size": 16, "channels": (8, 16), "num_bits": 8, "group_bits": 4}


def tiny(name="uniwetok", **args):
    torch.manual_seed(0)
    heads = {"num_heads": 2} if name == "uniwetok" else {}
    return make_tokenizer(name, {**SMALL, **heads, **args}).eval()


def images(height, width=None, num=2):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(num, 3, height, width or height, generator=generator)


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (16, 32), (4, 4)])
def test_images_of_other_sizes_are_encoded_to_all_their_tokens(size):
    """Mutation: tokens beyond the default layout's number are cut away."""
    tokenizer = tiny()
    tokens = tokenizer.encode(images(*size))
    shape = (size[0] // 4, size[1] // 4)
    assert tokens.layout.segments[0].shape == shape
    assert tokens.layout == tokenizer.layout_of(*size)
    assert tokens.length.tolist() == [shape[0] * shape[1]] * 2
    assert tokens.ids.shape == (2, shape[0] * shape[1], 2)
    drawn = tokenizer.decode(tokens)
    assert drawn.shape == (2, 3, *size)
    back = tokenizer.tokens_from_ids(tokens.ids, layout=tokens.layout)
    assert torch.equal(back.embeddings, tokens.embeddings)
    assert torch.equal(tokenizer.decode(back), drawn)
    output = tokenizer(images(*size), generator=torch.Generator().manual_seed(0))
    assert output.reconstruction.shape == (2, 3, *size)


def test_sizes_and_ids_that_do_not_fit_are_refused():
    tokenizer = tiny()
    for bad in (images(18), images(16, 18), images(16)[:, :1], images(16)[:, :, :0]):
        with pytest.raises(ValueError, match="takes float images"):
            tokenizer.encode(bad)
    layout = tokenizer.layout_of(24, 24)
    for ids in (torch.zeros(1, 16, 2), torch.zeros(1, 36), torch.full((1, 36, 2), 16)):
        with pytest.raises(ValueError, match="ids"):
            tokenizer.tokens_from_ids(ids.long(), layout=layout)
    with pytest.raises(ValueError, match="does not divide"):
        tiny(image_size=18)


def test_a_mask_beyond_a_length_is_kept_for_other_sizes():
    tokenizer = tiny()
    layout = tokenizer.layout_of(24, 24)
    ids = torch.zeros(2, 36, 2, dtype=torch.int64)
    tokens = tokenizer.tokens_from_ids(ids, torch.tensor([5, 36]), layout=layout)
    assert tokens.length.tolist() == [5, 36]


def test_ids_of_one_group_have_no_axis_of_groups():
    """Mutation: ids [B, L, 1], which tokens_from_ids refuses."""
    tokenizer = tiny(num_bits=4)
    for size in (16, 24):
        tokens = tokenizer.encode(images(size))
        assert tokens.ids.shape == tokens.mask.shape
        back = tokenizer.tokens_from_ids(tokens.ids, layout=tokens.layout)
        assert torch.equal(back.embeddings, tokens.embeddings)


def test_siglu_bounds_features_and_bitdance_does_not():
    x = 100 * images(16)
    with torch.no_grad():
        bounded, free = tiny().encode(x), tiny("bitdance").encode(x)
    assert float(bounded.features.abs().max()) < 1
    assert float(free.features.abs().max()) > 1
    for tokens in (bounded, free):
        assert torch.equal(tokens.embeddings, torch.where(tokens.features > 0, 1.0, -1.0))


@pytest.mark.parametrize("name", ["uniwetok", "bitdance"])
def test_the_quantisers_numbers_are_the_configs(name):
    """Mutation: one of them is not handed on."""
    numbers = {"entropy": 0.3, "diversity": 0.7, "commitment": 0.2, "temperature": 0.5}
    tokenizer = tiny(name, **numbers)
    output = tokenizer(images(16), generator=torch.Generator().manual_seed(0))
    grouped = output.tokens.features.unflatten(-1, (2, 4))
    assert tokenizer.quantizer.temperature == 0.5
    sure, diverse = tokenizer.quantizer.entropies(grouped, None)
    torch.testing.assert_close(output.losses["entropy"].value, sure - 0.7 * diverse)
    assert output.losses["entropy"].weight == 0.3
    assert output.losses["commitment"].weight == 0.2
    error = (output.tokens.features - output.tokens.embeddings).square().mean()
    torch.testing.assert_close(output.losses["commitment"].value, error)


def test_a_token_has_128_bits_without_a_table():
    tokenizer = tiny(num_bits=128, group_bits=8)
    tokens = tokenizer.encode(images(16))
    assert tokenizer.codebooks[0].bits == 128
    assert tokenizer.bits == 16 * 128
    assert tokens.ids.shape == (2, 16, 16)
    assert torch.equal(tokenizer.embed(tokens.ids), tokens.embeddings)


def test_bitdance_is_the_body_without_attention_noise_and_bound():
    names = {name for name, _ in tiny("bitdance").named_parameters()}
    more = {name for name, _ in tiny().named_parameters()}
    assert names < more
    assert all(".attention." in name for name in more - names)
    tokenizer = tiny("bitdance")
    assert (tokenizer.config.bound, tokenizer.config.use_noise) == ("none", False)
    assert tokenizer.decoder.first.in_channels == 8
    assert tiny().decoder.first.in_channels == 16


def test_noise_follows_the_generator_and_has_a_fixed_default():
    for name, differs in (("uniwetok", True), ("bitdance", False)):
        tokenizer = tiny(name)
        tokens = tokenizer.encode(images(16))

        def decoded(seed, tokenizer=tokenizer, tokens=tokens):
            return tokenizer.decode(tokens, generator=torch.Generator().manual_seed(seed))

        assert torch.equal(decoded(1), decoded(1))
        assert torch.equal(decoded(1), decoded(2)) != differs
        assert torch.equal(tokenizer.decode(tokens), tokenizer.decode(tokens))


def test_attention_knows_places_and_its_registers_reach_all_of_them():
    """Mutation: coords left out, so that mirroring the grid mirrors the result."""
    torch.manual_seed(1)
    attention = GridAttention(16, 1, num_heads=2, num_registers=2)
    grid = torch.randn(1, 16, 3, 4)
    plain, mirrored = attention(grid), attention(grid.flip(3)).flip(3)
    assert plain.shape == grid.shape
    assert float((plain - mirrored).detach().abs().max()) > 1e-3
    with torch.no_grad():
        attention.registers.add_(torch.randn_like(attention.registers))
    change = (attention(grid) - plain).detach().abs().amax(1)
    assert float(change.min()) > 1e-4


def test_the_places_are_the_same_when_the_resolution_doubles():
    """Four cells' centres average to the centre of the cell that they share."""
    tokenizer = tiny()
    coarse = tokenizer.layout_of(16, 16).coords[:, 1:].reshape(4, 4, 2)
    fine = tokenizer.layout_of(32, 32).coords[:, 1:].reshape(4, 2, 4, 2, 2)
    torch.testing.assert_close(fine.mean((1, 3)), coarse)


def test_adaptive_group_norm_by_hand():
    """Two style channels: spread (1, 0.5), mean (0, 2). Gain = spread of 1, offset = mean of 2."""
    norm = AdaptiveGroupNorm(4, 2).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=generator)
    style = torch.tensor([[[[1.0, -1.0]], [[2.5, 1.5]]]], dtype=torch.float64)
    plain = torch.nn.functional.group_norm(x, 4)
    torch.testing.assert_close(norm(x, style), plain)
    with torch.no_grad():
        norm.gain.bias.zero_()
        norm.gain.weight[:, 0], norm.offset.weight[:, 1] = 3.0, 1.0
    expected = 3 * (1 + 1e-6) ** 0.5 * plain + 2
    torch.testing.assert_close(norm(x, style), expected)
    assert bool(norm(x, style[..., :1]).isfinite().all())  # one token has no sample deviation


def test_every_stage_of_the_decoder_reads_the_grid_as_a_style():
    """Mutation: a stage without its adaptive norm."""
    torch.manual_seed(0)
    decoder = HybridDecoder(4, (8, 8), 3, attention_depth=0)
    grid = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    decoder(grid).square().sum().backward()
    for style in decoder.styles:
        assert all(bool(weight.grad.any()) for weight in style.parameters())
