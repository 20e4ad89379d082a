"""Hita: who sees whom, which tokens are dead, whose table a code is of, what trains what."""

from dataclasses import replace

import pytest
import torch

from tokenizers_vis.hita import Hita, HitaConfig

SMALL = HitaConfig(
    image_size=16, channels=(8, 16), num_slots=4, shift=1, slot_vocab=16, patch_vocab=32, dim=4,
    width=32, num_heads=2, full_depth=1, causal_depth=1, fusion_depth=2,
)  # fmt: skip
SLOTS, PATCHES = 4, 16


def hita(**changes):
    torch.manual_seed(0)
    return Hita(replace(SMALL, **changes)).eval()


def images(num=2):
    return torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def influence(tokenizer):
    """Bool [N, S + N]: patch feature i depends on token j. By gradients."""
    embeddings = tokenizer.encode(images(1)).embeddings.detach().requires_grad_()
    features = tokenizer.fused(embeddings)[0]
    # A random direction: a sum over a layer norm's output has no gradient at all.
    direction = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(2))
    rows = []
    for feature in features:
        (gradient,) = torch.autograd.grad(feature @ direction, embeddings, retain_graph=True)
        rows.append((gradient[0] != 0).any(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_a_patch_is_made_of_the_slots_and_of_patches_shift_places_before(shift):
    # Patch i is read at position S + i - k. Killed by reading one position off, and by a fusion
    # without its causal mask.
    seen = influence(hita(shift=shift))
    last = SLOTS - shift + torch.arange(PATCHES)
    assert torch.equal(seen, torch.arange(SLOTS + PATCHES) <= last[:, None])


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_the_dead_tokens_are_exactly_the_last_ones(shift):
    tokenizer = hita(shift=shift)
    tokens = tokenizer.encode(images())
    embeddings = tokens.embeddings.detach().requires_grad_()
    drawn = tokenizer._image(embeddings)
    (drawn * torch.randn(drawn.shape)).sum().backward()
    dead = (embeddings.grad == 0).all(-1).all(0)
    wanted = torch.arange(SLOTS + PATCHES) >= SLOTS + PATCHES - shift
    assert torch.equal(dead, wanted)
    assert torch.equal(dead.nonzero()[:, 0], torch.arange(SLOTS + PATCHES)[tokenizer.dead_tokens])
    # And so they may be anything, e.g. left out by an autoregressive model.
    short = tokenizer.tokens_from_ids(tokens.ids[:, : SLOTS + PATCHES - shift])
    assert torch.equal(tokenizer.decode(short), tokenizer.decode(tokens))


def test_encoding_is_causal_after_the_blocks_that_see_all():
    # Token order is generation order: killed by a `causal` trunk without its mask.
    tokenizer = hita()
    seen = []

    def keep(_module, _inputs, output):
        seen.append(output.detach().requires_grad_())
        return seen[0]

    handle = tokenizer.full.register_forward_hook(keep)
    feature = tokenizer.encode(images(1)).features[0, 5]
    handle.remove()
    (gradient,) = torch.autograd.grad(feature @ torch.randn(4), seen[0])
    assert (gradient[0] != 0).any(-1).tolist() == [position <= 5 for position in range(20)]
    # While the first slot sees the last patch through `full`.
    pixels = images(1).requires_grad_()
    first = tokenizer.encode(pixels).features[0, 0]
    (gradient,) = torch.autograd.grad(first @ torch.randn(4), pixels)
    assert gradient[0, :, -1, -1].any()


def test_slots_and_patches_have_a_table_each():
    tokenizer = hita()
    tokens = tokenizer.encode(images())
    slots, patches = tokens.ids.split([SLOTS, PATCHES], dim=1)
    expected = torch.cat(
        [tokenizer.slot_table.embed(slots), tokenizer.patch_table.embed(patches)], 1
    )
    assert torch.equal(tokens.embeddings, expected)
    assert torch.equal(tokenizer.tokens_from_ids(tokens.ids).embeddings, expected)
    with pytest.raises(ValueError, match="ids of 'slot'"):
        tokenizer.tokens_from_ids(torch.full((1, SLOTS + PATCHES), 16))
    assert tokenizer.bits == SLOTS * 4 + PATCHES * 5
    assert {"slot/used", "patch/used"} <= set(tokenizer.usage(tokens.ids))


def test_slots_learn_from_the_pixels():
    # Killed by detaching the slots, or by a quantiser without its straight-through gradient.
    # Not seen in the queries' gradient: patches look at them, too.
    tokenizer = hita().train()
    output = tokenizer(images(), progress=1.0)
    pixels = [output.losses[name].weighted for name in ("pixel_l1", "pixel_l2")]
    torch.stack(pixels).sum().backward()
    for table in (tokenizer.slot_table, tokenizer.patch_table):
        assert table.project[1].weight.grad.any()
    assert tokenizer.queries.grad.any(dim=1).all()
    assert set(output.losses) == {
        "pixel_l1", "pixel_l2", "slot_commitment", "patch_commitment",
    }  # fmt: skip


def test_quantisation_sets_in_token_by_token():
    tokenizer = hita(warm_up=0.5)
    tokens = tokenizer.encode(images(64))

    def soft(progress):
        generator = torch.Generator().manual_seed(0)
        found = tokenizer.softened(tokens, progress=progress, generator=generator).embeddings
        is_soft = (found == tokens.features).all(-1)
        is_hard = (found == tokens.embeddings).all(-1)
        assert (is_soft | is_hard).all()
        return float(is_soft.float().mean())

    assert soft(0.0) == 1.0 and soft(0.5) == 0.0 and soft(1.0) == 0.0
    # 1 - 0.125 / 0.5 = 3/4 of 1280 tokens: 5 standard deviations are 0.06.
    assert soft(0.125) == pytest.approx(0.75, abs=0.06)
    assert hita(warm_up=0.0).softened(tokens, progress=0.0, generator=None) is tokens


def test_the_commitment_sets_in_with_quantisation():
    # Full from the start, it pulls the features of all images onto one code.
    tokenizer = hita(warm_up=0.5).train()
    for progress, weight in ((0.0, 0.0), (0.125, 0.25 * 0.25), (0.5, 0.25), (1.0, 0.25)):
        losses = tokenizer(images(), progress=progress, generator=torch.Generator()).losses
        for name in ("slot_commitment", "patch_commitment"):
            assert losses[name].weight == pytest.approx(weight)
        assert losses["pixel_l2"].weight == 1.0


@pytest.mark.parametrize("shift", [-1, 5, 16])
def test_a_shift_that_leaves_no_reading_is_refused(shift):
    with pytest.raises(ValueError, match=f"shift {shift}"):
        hita(shift=shift, num_slots=4)


def test_strides_must_fit_the_image():
    with pytest.raises(ValueError, match="image_size 18"):
        hita(image_size=18)
