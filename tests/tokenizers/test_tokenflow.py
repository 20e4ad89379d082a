"""TokenFlow: one index for both codebooks, what is decoded, where the teacher's gradient goes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizers_vis.addons.registry import make_addon
from tokenizers_vis.registry import make_tokenizer, save_pretrained
from tokenizers_vis.teachers import frozen
from tokenizers_vis.training import TokenizerTraining

ARGS = {
    "image_size": 16, "channels": (8, 16), "scales": (1, 2, 4), "vocab": 32, "semantic_dim": 8,
    "pixel_dim": 4, "dim": 32, "num_heads": 2, "semantic_depth": 1, "decoder_depth": 1,
    "teacher_dim": 6,
}  # fmt: skip


def tokenflow(**args):
    torch.manual_seed(0)
    return make_tokenizer("tokenflow", {**ARGS, **args})


def images(num=3):
    return torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def teacher(x):
    """Features of a 2 x 2 grid, of width 6: means and spreads of the colours."""
    cells = F.unfold(x, 8, stride=8).unflatten(1, (3, 64))
    return torch.cat([cells.mean(2), cells.std(2)], 1).transpose(1, 2)


def test_any_prefix_of_scales_is_a_number_of_tokens():
    assert tokenflow().token_counts == (1, 5, 21)
    assert tokenflow().layout.nested


# Must verify (b). Mutation: an id of its own for either table.
def test_one_id_looks_up_both_codes():
    tokenizer = tokenflow()
    tokens = tokenizer.encode(images())
    semantic, pixel = tokens.embeddings.split((8, 4), dim=-1)
    codes = tokenizer.quantizer.table.codes
    assert tokens.ids.shape == (3, 21)
    assert torch.equal(semantic, codes[tokens.ids][..., :8])
    assert torch.equal(pixel, codes[tokens.ids][..., 8:])


# Must verify (c). Mutation: decode the last scale, or forget the enlargement of one.
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_the_decoder_sees_the_sum_of_the_enlarged_scales(scales):
    tokenizer = tokenflow()
    codes = tokenizer.encode(images()).embeddings
    first = codes[:, :1].transpose(1, 2)[..., None].expand(-1, -1, 4, 4)
    second = codes[:, 1:5].transpose(1, 2).unflatten(2, (2, 2))
    second = F.interpolate(second, size=(4, 4), mode="bicubic", align_corners=False)
    third = codes[:, 5:].transpose(1, 2).unflatten(2, (4, 4))
    total = sum([first, second, third][:scales])
    wanted = ((tokenizer.pixel_decoder(total) + 1) / 2).clamp(0, 1)
    count = tokenizer.token_counts[scales - 1]
    found = tokenizer.decode(tokenizer.encode(images(), count))
    assert torch.allclose(found, wanted, atol=1e-5)


def grads(tokenizer, prefix):
    pairs = tokenizer.named_parameters()
    return [p.grad is not None and bool(p.grad.any()) for n, p in pairs if n.startswith(prefix)]


# Mutation: read the semantics from both parts, or without the straight-through estimate.
def test_the_semantic_loss_teaches_the_semantic_branch_alone():
    tokenizer = tokenflow().teach(teacher)
    output = tokenizer(images())
    output.losses["semantic"].value.backward()
    assert all(grads(tokenizer, "semantic_out")) and all(grads(tokenizer, "semantic_in"))
    assert any(grads(tokenizer, "semantic_encoder"))
    assert not any(grads(tokenizer, "pixel"))
    assert not any(grads(tokenizer, "quantizer"))  # codes follow features by their own loss


def test_pixels_teach_both_encoders():
    tokenizer = tokenflow().teach(teacher)
    output = tokenizer(images())
    output.losses["pixel_l2"].value.backward()
    assert any(grads(tokenizer, "semantic_encoder")) and any(grads(tokenizer, "pixel_encoder"))
    assert not any(grads(tokenizer, "semantic_decoder"))


def test_the_semantic_loss_is_one_minus_the_cosine_on_the_grid():
    tokenizer = tokenflow(scale_dropout=0.0).teach(lambda x: teacher(x).mean(1))
    output = tokenizer(images())
    told = F.normalize(tokenizer.semantics(output.tokens), dim=-1)
    wanted = F.normalize(teacher(images()).mean(1), dim=-1)
    by_hand = 1 - torch.einsum("bpd,bd->bp", told, wanted).mean()
    assert output.losses["semantic"].value.item() == pytest.approx(by_hand.item(), abs=1e-5)


def test_what_is_masked_says_nothing_to_the_semantics():
    tokenizer = tokenflow()
    tokens = tokenizer.encode(images(), 5)
    spoilt = tokens.embeddings.clone()
    spoilt[:, 5:] = 1e3
    other = type(tokens)(spoilt, tokens.mask, tokens.layout)
    assert torch.equal(tokenizer.semantics(tokens), tokenizer.semantics(other))


def test_a_teacher_is_not_saved_and_gets_no_gradient(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 6))
    tokenizer = tokenflow().teach(frozen(network))
    assert not any("network" in name for name in tokenizer.state_dict())
    assert len(list(tokenizer.parameters())) == len(list(tokenflow().parameters()))
    tokenizer(images()).loss.backward()
    assert all(p.grad is None for p in tokenizer._teacher[0].parameters())
    save_pretrained(tokenizer, tmp_path)
    assert "semantic" not in tokenflow()(images()).losses


def test_encoding_in_training_mode_is_a_pure_function():
    tokenizer = tokenflow(scale_dropout=1.0)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    one, other = (tokenizer.train().encode(images()) for _ in range(2))
    assert torch.equal(one.embeddings, other.embeddings)
    assert not (one.embeddings == 0).all(-1).any()
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_scale_is_lost_in_training_as_often_as_the_config_says():
    """Mutations: the config's share, or its commitment, does not reach the quantiser."""
    level = tokenflow().layout.level
    for share, lost in ((1.0, 1), (0.0, 0)):
        tokenizer = tokenflow(scale_dropout=share, commitment=0.5).train()
        output = tokenizer(images(), generator=torch.Generator().manual_seed(0))
        silent = (output.tokens.embeddings == 0).all(-1)
        per_scale = torch.stack([silent[:, level == n].all(1) for n in range(3)], 1)
        assert (per_scale.sum(1) == lost).all()
        assert output.losses["commitment"].weight == 0.5


def test_training_logs_the_rank_in_either_codebook():
    metrics = tokenflow()(images()).metrics
    assert set(metrics) == {"rank_0", "rank_1"}
    # With all the weight on pixels the chosen code is the nearest one of the pixel table.
    by_pixels = tokenflow(pixel_weight=1e9)(images()).metrics
    assert by_pixels["rank_1"] == 0 < by_pixels["rank_0"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"scales": (1, 2)}, "must be the encoders' grid, 4"),
        ({"image_size": 18}, "does not divide"),
        ({"pixel_weight": -1.0}, "weights of parts"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        tokenflow(**args)


def test_a_teacher_of_another_width_is_refused():
    with pytest.raises(ValueError, match="6 wide, teacher_dim is 5"):
        tokenflow(teacher_dim=5).teach(teacher)


def test_the_add_on_sets_the_teacher_by_its_name_in_timm():
    tokenizer = tokenflow(teacher_dim=64)
    args = {"teacher": "test_vit", "image_size": 64, "is_pretrained": False}
    training = TokenizerTraining(tokenizer, addons={"t": make_addon("semantic_teacher", args)})
    output = training(images(), progress=0.0)
    assert set(output.losses) == {"pixel_l1", "pixel_l2", "codebook", "commitment", "semantic"}
    assert not list(training.addons.parameters())
    with pytest.raises(ValueError, match="is for tokenflow, not for grid"):
        TokenizerTraining(
            make_tokenizer("grid", {"image_size": 16, "channels": (8, 16)}),
            addons={"t": make_addon("semantic_teacher", args)},
        )


def test_a_pixel_only_tokenizer_takes_no_teacher():
    with pytest.raises(ValueError, match="semantic_dim > 0"):
        tokenflow(semantic_dim=0).teach(teacher)
