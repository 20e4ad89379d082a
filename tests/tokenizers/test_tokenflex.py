"""TokenFLEX: averages over bins, a projector, one grid per number of tokens."""

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis.addons.dropout import TokenDropout
from tokenizers_vis.tokenflex import FlexiblePool, TokenFlex, TokenFlexConfig, pooled
from tokenizers_vis.training import TokenizerTraining

SMALL = TokenFlexConfig(
    image_size=16, patch_size=4, dim=8, width=32, num_heads=2, hidden=16, depth=1, reader_depth=1
)


def tokenflex():
    torch.manual_seed(0)
    return TokenFlex(SMALL).eval()


def images(num=3):
    return torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_bins_are_averages_and_overlap_where_they_do_not_divide():
    # Rows 0..8 of a 3 x 3 grid to 2 x 2: bins of rows {0, 1} and {1, 2}, columns alike.
    features = torch.arange(9.0)[None, :, None]
    assert pooled(features, grid=(3, 3), side=2).flatten().tolist() == [2, 3, 5, 6]
    # 2 x 4 to 2 x 2: rows are kept and columns paired; killed by mixing up rows and columns.
    assert pooled(torch.arange(8.0)[None, :, None], grid=(2, 4), side=2).flatten().tolist() == [
        0.5, 2.5, 4.5, 6.5,
    ]  # fmt: skip


def test_at_the_grids_own_size_the_pool_is_the_identity():
    features = torch.randn(2, 16, 5)
    assert torch.equal(pooled(features, grid=(4, 4), side=4), features)
    assert torch.allclose(pooled(features, grid=(4, 4), side=1)[:, 0], features.mean(1))


@pytest.mark.parametrize("side", [0, 5])
def test_more_bins_than_features_are_refused(side):
    with pytest.raises(ValueError, match=f"not {side}"):
        pooled(torch.randn(1, 16, 5), grid=(4, 4), side=side)


def test_the_projector_is_gated():
    # W_o (SiLU(W_g p) * W_u p), written out: killed by gating the other half, or by no norm.
    torch.manual_seed(0)
    pool = FlexiblePool(6, 4, hidden=5)
    features = torch.randn(2, 9, 6)
    p = F.layer_norm(pooled(features, grid=(3, 3), side=2), (6,), eps=1e-6)
    weight, bias = pool.project.gate_up.weight, pool.project.gate_up.bias
    gate, up = p @ weight[:5].T + bias[:5], p @ weight[5:].T + bias[5:]
    expected = (gate * torch.sigmoid(gate) * up) @ pool.project.down.weight.T
    expected = expected + pool.project.down.bias
    found = pool(features, grid=(3, 3), side=2)
    assert found.shape == (2, 4, 4) and torch.allclose(found, expected, atol=1e-6)


def test_every_square_up_to_the_grid_can_be_kept_and_has_its_own_layout():
    tokenizer = tokenflex()
    assert tokenizer.token_counts == (1, 4, 9, 16)
    for side in (1, 2, 3, 4):
        tokens = tokenizer.encode(images(), side * side)
        assert tokens.embeddings.shape == (3, side * side, 8) and tokens.mask.all()
        assert tokens.layout.segments[0].shape == (side, side)
    # Two a side lie at a quarter and three quarters, not at the first cells of the full grid.
    coords = tokenizer.encode(images(), 4).layout.coords[:, 1:]
    assert coords.tolist() == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    with pytest.raises(ValueError, match="keeps 1, 4, 9 or 16 tokens, not 8"):
        tokenizer.encode(images(), 8)


def test_a_coarse_grid_is_an_average_and_no_prefix():
    # Killed by cutting the full grid's tokens to the first four.
    tokenizer = tokenflex()
    full, four = tokenizer.encode(images(), 16), tokenizer.encode(images(), 4)
    assert not torch.allclose(full.embeddings[:, :4], four.embeddings, atol=1e-2)
    features = tokenizer.features(images())
    corner = features.unflatten(1, (4, 4))[:, :2, :2].mean((1, 2))
    expected = tokenizer.pool.project(tokenizer.pool.norm(corner))
    assert torch.allclose(four.embeddings[:, 0], expected, atol=1e-5)


def test_images_of_a_batch_may_keep_different_numbers():
    tokenizer = tokenflex()
    counts = torch.tensor([4, 16, 1])
    output = tokenizer(images(), num_tokens=counts)
    assert output.tokens.length.tolist() == [4, 16, 1]
    for row, count in enumerate(counts.tolist()):
        alone = tokenizer(images()[row : row + 1], num_tokens=counts[row : row + 1])
        assert torch.allclose(
            output.tokens.embeddings[row, :count], alone.tokens.embeddings[0], atol=1e-5
        )
        assert torch.allclose(output.reconstruction[row], alone.reconstruction[0], atol=1e-5)
        assert not output.tokens.embeddings[row, count:].any()


def test_the_reader_sees_nothing_but_the_tokens():
    # Killed by handing it the features before the pool.
    tokenizer = tokenflex()
    tokens = tokenizer.encode(images(), 1).embeddings
    same = tokenizer._read(tokens[:1].expand(3, -1, -1), 1)
    assert torch.allclose(same[0], same[1], atol=1e-6)
    assert not torch.allclose(tokenizer._read(tokens, 1)[0], tokenizer._read(tokens, 1)[1])


def test_it_trains_with_one_count_per_batch():
    dropout = TokenDropout("uniform", counts=(1, 4, 16), is_shared=True)
    training = TokenizerTraining(tokenflex(), dropout=dropout)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(12):
        output = training(images(), progress=0.0, generator=generator)
        assert output.tokens.mask.all()
        seen.add(output.tokens.mask.shape[1])
    assert seen == {1, 4, 16}


def test_what_it_cannot_do_is_refused():
    tokenizer = tokenflex()
    with pytest.raises(ValueError, match="language model"):
        tokenizer.decode(tokenizer.encode(images()))
    with pytest.raises(ValueError, match="continuous"):
        tokenizer.tokens_from_ids(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="patch_size 5"):
        TokenFlex(TokenFlexConfig(image_size=16, patch_size=5))
