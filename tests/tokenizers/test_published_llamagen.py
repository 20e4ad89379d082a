"""LlamaGen's checkpoint: names and shapes as published, and equal to diffusers' VQGAN."""

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import save_file

from tokenizers_vis.published.llamagen import LlamaGenVq
from tokenizers_vis.registry import load_pretrained

WIDTHS, CHANNELS, BLOCKS, Z, VOCAB, DIM = (32, 64), 32, 2, 64, 24, 4


def layout():
    """{name: shape} of a two-level model, written from the published code and not from ours."""
    shapes = {}

    def conv(name, after, before, size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (after, before, size, size), (after,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def res(name, before, after):
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", after, before, 3)
        norm(f"{name}.norm2", after)
        conv(f"{name}.conv2", after, after, 3)
        if before != after:
            conv(f"{name}.nin_shortcut", after, before, 1)

    def attn(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    for side, order, blocks in (
        ("encoder", [CHANNELS, *WIDTHS], BLOCKS),
        ("decoder", [WIDTHS[-1], *reversed(WIDTHS)], BLOCKS + 1),
    ):
        conv(f"{side}.conv_in", order[0], 3 if side == "encoder" else Z, 3)
        coarse = len(WIDTHS) - 1 if side == "encoder" else 0
        for level in range(len(WIDTHS)):
            before, after = order[level], order[level + 1]
            for block in range(blocks):
                res(f"{side}.conv_blocks.{level}.res.{block}", after if block else before, after)
                if level == coarse:
                    attn(f"{side}.conv_blocks.{level}.attn.{block}", after)
            if level < len(WIDTHS) - 1:
                resample = "downsample" if side == "encoder" else "upsample"
                conv(f"{side}.conv_blocks.{level}.{resample}.conv", after, after, 3)
        res(f"{side}.mid.0", WIDTHS[-1], WIDTHS[-1])
        attn(f"{side}.mid.1", WIDTHS[-1])
        res(f"{side}.mid.2", WIDTHS[-1], WIDTHS[-1])
        norm(f"{side}.norm_out", order[-1])
        conv(f"{side}.conv_out", Z if side == "encoder" else 3, order[-1], 3)
    conv("quant_conv", DIM, Z, 1)
    conv("post_quant_conv", Z, DIM, 1)
    shapes["quantize.embedding.weight"] = (VOCAB, DIM)
    shapes["quantize.codebook_used"] = (65536,)
    return shapes


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.1 * torch.randn(shape, generator=generator)
        + float("norm" in name and name.endswith("weight"))
        for name, shape in layout().items()
    }


@pytest.fixture
def saved(tmp_path):
    torch.save({"model": weights()}, tmp_path / "vq_ds16_c2i.pt")
    return tmp_path


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def renamed(name):
    """The name in diffusers' VQGAN of one of LlamaGen's encoder or decoder."""
    side, part, *rest = name.split(".")
    down = side == "encoder"
    if part in ("conv_in", "conv_out", "norm_out"):
        return ".".join([side, part.replace("norm_out", "conv_norm_out"), *rest])
    if part == "mid":
        kind = "attentions.0" if rest[0] == "1" else f"resnets.{int(rest[0]) // 2}"
        inner = f"mid_block.{kind}"
    else:
        kind = {"res": "resnets", "attn": "attentions"}.get(rest[1])
        at = f"{'down' if down else 'up'}_blocks.{rest[0]}"
        if kind is None:
            return f"{side}.{at}.{'down' if down else 'up'}samplers.0.{rest[2]}.{rest[3]}"
        inner, rest = f"{at}.{kind}.{rest[2]}", rest[2:]
    leaf = ".".join(rest[1:]).replace("nin_shortcut", "conv_shortcut")
    if "attentions" in inner:
        for old, new in (("norm.", "group_norm."), ("q.", "to_q."), ("k.", "to_k."),
                         ("v.", "to_v."), ("proj_out.", "to_out.0.")):  # fmt: skip
            if leaf.startswith(old):
                leaf = new + leaf.removeprefix(old)
                break
    return f"{side}.{inner}.{leaf}"


def reference():
    """diffusers' VQModel with the same weights: an implementation that is not ours."""
    model = VQModel(
        block_out_channels=WIDTHS, layers_per_block=BLOCKS, latent_channels=Z, vq_embed_dim=DIM,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), num_vq_embeddings=VOCAB,
    ).eval()  # fmt: skip
    state = {}
    for name, value in weights().items():
        if name == "quantize.codebook_used":
            continue
        new = renamed(name) if name.startswith(("encoder", "decoder")) else name
        state[new] = value[..., 0, 0] if "attentions" in new and value.ndim == 4 else value
    model.load_state_dict(state)
    return model


@torch.no_grad()
def test_it_is_the_published_network_with_codes_of_unit_length(saved):
    """Mutations: [0, 1] images; padding left and above; codes that are not normalised."""
    tokenizer, model = LlamaGenVq.from_published(saved, image_size=16), reference()
    tokens = tokenizer.encode(images())
    hidden = model.encode(images() * 2 - 1).latents
    unit = torch.nn.functional.normalize(hidden, dim=1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.features, unit, atol=1e-5, rtol=0)
    codes = torch.nn.functional.normalize(weights()["quantize.embedding.weight"], dim=-1)
    by_hand = (unit[:, :, None] - codes).square().sum(-1).argmin(-1)
    assert torch.equal(tokens.ids, by_hand) and len(by_hand.unique()) > 3
    grid = codes[by_hand].transpose(1, 2).reshape(2, DIM, 8, 8)
    drawn = model.decoder(model.post_quant_conv(grid))
    expected = ((drawn + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(tokens), expected, atol=1e-5, rtol=0)
    assert float(((expected > 0) & (expected < 1)).float().mean()) > 0.05  # not all clamped


@torch.no_grad()
def test_permuted_codes_give_permuted_ids_and_the_same_images(tmp_path, saved):
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))
    other = weights()
    other["quantize.embedding.weight"] = other["quantize.embedding.weight"][order]
    save_file(other, tmp_path / "permuted.safetensors")
    first = LlamaGenVq.from_published(saved, image_size=16)
    second = LlamaGenVq.from_published(tmp_path / "permuted.safetensors", image_size=16)
    ids, moved = first.encode(images()).ids, second.encode(images()).ids
    assert torch.equal(order[moved], ids) and not torch.equal(moved, ids)
    same = second.decode(second.tokens_from_ids(moved)), first.decode(first.tokens_from_ids(ids))
    torch.testing.assert_close(*same, atol=1e-6, rtol=0)


def test_the_names_of_vq_16_are_all_there():
    """The defaults are VQ-16's: 5 levels, four halvings, 16384 codes of 8."""
    tokenizer = load_defaults()
    assert tokenizer.layout.segments[0].shape == (16, 16)
    assert tokenizer.quantize.embedding.weight.shape == (16384, 8)
    shapes = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    assert shapes["encoder.conv_blocks.4.attn.1.q.weight"] == (512, 512, 1, 1)
    assert shapes["encoder.conv_blocks.2.res.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.conv_blocks.0.attn.2.proj_out.bias"] == (512,)
    assert shapes["decoder.conv_blocks.3.upsample.conv.weight"] == (128, 128, 3, 3)
    assert "decoder.conv_blocks.4.upsample.conv.weight" not in shapes
    # Parameters counted by hand from the layout: 71.9 million of VQ-16 (the paper says 72M).
    assert sum(value.numel() for value in tokenizer.parameters()) == pytest.approx(72e6, rel=0.01)


def load_defaults():
    from tokenizers_vis.published.llamagen import LlamaGenConfig

    with torch.device("meta"):
        return LlamaGenVq(LlamaGenConfig())


def test_what_does_not_fit_is_named(tmp_path):
    def load(given):
        torch.save(given, tmp_path / "a.pt")
        return LlamaGenVq.from_published(tmp_path / "a.pt", image_size=16)

    good = weights()
    with pytest.raises(ValueError, match=r"quant_conv\.bias is missing"):
        load({"model": {k: v for k, v in good.items() if k != "quant_conv.bias"}})
    with pytest.raises(ValueError, match="loss is unknown"):
        load({"model": good | {"loss": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"encoder\.conv_blocks\.0"):
        load({"model": {"a": torch.zeros(1)}})
    with pytest.raises(ValueError, match="none of the keys ema, model, state_dict"):
        load({"weights": good})
    with pytest.raises(FileNotFoundError, match="without vq_ds16"):
        LlamaGenVq.from_published(tmp_path / ".")


def test_the_averaged_weights_come_first(tmp_path, saved):
    """As in the published code. Mutation: the order of the holders."""
    torch.save({"model": weights(7), "ema": weights()}, tmp_path / "both.pt")
    both = LlamaGenVq.from_published(tmp_path / "both.pt", image_size=16)
    assert torch.equal(both.quant_conv.weight, weights()["quant_conv.weight"])


def test_it_is_loaded_by_name(saved):
    tokenizer = load_pretrained(f"llamagen_vq:{saved}")
    assert tokenizer.sample_shape == (3, 256, 256) and not tokenizer.training
