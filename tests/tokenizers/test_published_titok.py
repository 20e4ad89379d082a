"""TiTok's checkpoints: the published layouts, and equal to a plain reading of the paper's code."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tokenizers_vis.published.titok import PublishedTiTok, TiTokConfig
from tokenizers_vis.registry import load_pretrained

SIZE, PATCH, TOKENS, TOKEN_DIM, VOCAB = 16, 8, 4, 6, 32
ENCODER, DECODER = (128, 2), (64, 1)  # width, blocks
PROXY, PROXY_VOCAB, PROXY_DIM = (32, 64, 64), 20, 8  # three levels: patches of 4


def layout(kind):
    """{name: shape} of "legacy", "pixels" and "vae", written from the published code."""
    shapes = {"latent_tokens": (TOKENS, ENCODER[0])}
    decoder_patch = 4
    for side, (dim, depth) in (("encoder", ENCODER), ("decoder", DECODER)):
        grid = SIZE // (PATCH if side == "encoder" else decoder_patch)
        shapes |= {
            f"{side}.class_embedding": (1, dim),
            f"{side}.positional_embedding": (grid**2 + 1, dim),
            f"{side}.latent_token_positional_embedding": (TOKENS, dim),
        }
        for norm in ("ln_pre", "ln_post"):
            shapes |= {f"{side}.{norm}.weight": (dim,), f"{side}.{norm}.bias": (dim,)}
        for block in range(depth):
            at = f"{side}.transformer.{block}"
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{at}.{norm}.weight": (dim,), f"{at}.{norm}.bias": (dim,)}
            shapes |= {
                f"{at}.attn.in_proj_weight": (3 * dim, dim), f"{at}.attn.in_proj_bias": (3 * dim,),
                f"{at}.attn.out_proj.weight": (dim, dim), f"{at}.attn.out_proj.bias": (dim,),
                f"{at}.mlp.c_fc.weight": (4 * dim, dim), f"{at}.mlp.c_fc.bias": (4 * dim,),
                f"{at}.mlp.c_proj.weight": (dim, 4 * dim), f"{at}.mlp.c_proj.bias": (dim,),
            }  # fmt: skip
    width, out = DECODER[0], TOKEN_DIM * (2 if kind == "vae" else 1)
    convs = {
        "encoder.patch_embed": (ENCODER[0], 3, PATCH, PATCH),
        "encoder.conv_out": (out, ENCODER[0], 1, 1),
        "decoder.decoder_embed": (width, TOKEN_DIM),
    }
    shapes["decoder.mask_token"] = (1, 1, width)
    if kind != "vae":
        shapes["quantize.embedding.weight"] = (VOCAB, TOKEN_DIM)
    if kind != "legacy":
        convs |= {
            "decoder.ffn.0": (3 * decoder_patch**2, width, 1, 1),
            "decoder.conv_out": (3, 3, 3, 3),
        }
    else:
        convs |= {
            "decoder.ffn.0": (2 * width, width, 1, 1),
            "decoder.ffn.2": (PROXY_VOCAB, 2 * width, 1, 1),
        }
        shapes |= proxy()
    for name, shape in convs.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}
    return shapes


def proxy():
    """MaskGIT's decoder, whose levels are counted from the finest."""
    shapes = {"pixel_quantize.embedding.weight": (PROXY_VOCAB, PROXY_DIM)}

    def conv(name, after, before, size, bias=True):
        shapes[f"pixel_decoder.{name}.weight"] = (after, before, size, size)
        if bias:
            shapes[f"pixel_decoder.{name}.bias"] = (after,)

    def norm(name, dim):
        shapes[f"pixel_decoder.{name}.weight"] = shapes[f"pixel_decoder.{name}.bias"] = (dim,)

    def block(name, before, after):
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", after, before, 3, bias=False)
        norm(f"{name}.norm2", after)
        conv(f"{name}.conv2", after, after, 3, bias=False)
        if before != after:
            conv(f"{name}.nin_shortcut", after, after, 1, bias=False)

    conv("conv_in", PROXY[-1], PROXY_DIM, 3)
    for number in range(2):
        block(f"mid.{number}", PROXY[-1], PROXY[-1])
    for level, after in enumerate(PROXY):
        before = PROXY[min(level + 1, len(PROXY) - 1)]
        for number in range(2):
            block(f"up.{level}.block.{number}", before if number == 0 else after, after)
        if level:
            conv(f"up.{level}.upsample_conv", after, after, 3)
    norm("norm_out", PROXY[0])
    conv("conv_out", 3, PROXY[0], 3)
    return shapes


def weights(kind):
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.2 * torch.randn(shape, generator=generator)
        + float(("norm" in name or "ln_" in name) and name.endswith("weight"))
        for name, shape in layout(kind).items()
    }


def saved(path, kind, **vq_model):
    """A checkpoint as PyTorchModelHubMixin writes TiTok's."""
    numbers = {
        "vit_enc_model_size": "large", "vit_dec_model_size": "large", "vit_enc_patch_size": PATCH,
        "vit_dec_patch_size": 4, "num_latent_tokens": TOKENS, "token_size": TOKEN_DIM,
    }  # fmt: skip
    if kind == "legacy":
        numbers |= {"codebook_size": VOCAB, "use_l2_norm": True, "finetune_decoder": True}
    else:
        numbers |= {"is_legacy": False, "finetune_decoder": False}
        numbers |= {"quantize_mode": "vae"} if kind == "vae" else {"use_l2_norm": False}
    config = {
        "experiment": {"output_dir": "a"},
        "model": {"vq_model": numbers | vq_model},
        "dataset": {"preprocessing": {"crop_size": SIZE}},
    }
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights(kind), path / "model.safetensors")
    return path


def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def vit(w, side, patches, tokens):
    """Patches [P, D] and tokens [L, D] of one image, all that leaves the last block."""
    dim = patches.shape[1]
    x = torch.cat([w[f"{side}.class_embedding"], patches]) + w[f"{side}.positional_embedding"]
    x = torch.cat([x, tokens + w[f"{side}.latent_token_positional_embedding"]])
    norm = lambda x, name: F.layer_norm(x, (dim,), w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    x, block = norm(x, f"{side}.ln_pre"), 0
    while f"{side}.transformer.{block}.ln_1.weight" in w:
        at = f"{side}.transformer.{block}"
        qkv = (
            norm(x, f"{at}.ln_1") @ w[f"{at}.attn.in_proj_weight"].T + w[f"{at}.attn.in_proj_bias"]
        )
        heads = []
        for head in range(dim // 64):
            q, k, v = (qkv[:, part * dim + 64 * head :][:, :64] for part in range(3))
            heads.append((q @ k.T / 8).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[f"{at}.attn.out_proj.weight"].T
        x = x + w[f"{at}.attn.out_proj.bias"]
        inner = F.linear(
            norm(x, f"{at}.ln_2"), w[f"{at}.mlp.c_fc.weight"], w[f"{at}.mlp.c_fc.bias"]
        )
        x = x + F.linear(F.gelu(inner), w[f"{at}.mlp.c_proj.weight"], w[f"{at}.mlp.c_proj.bias"])
        block += 1
    return norm(x, f"{side}.ln_post")  # of every position: what is read is a slice of it


def features(w, image, is_legacy):
    """[L, out] of one image [3, H, W] in [0, 1]."""
    rows = [image[:, r : r + PATCH, c : c + PATCH].flatten()
            for r in range(0, SIZE, PATCH) for c in range(0, SIZE, PATCH)]  # fmt: skip
    kernel = w["encoder.patch_embed.weight"].flatten(1)
    patches = torch.stack(rows) @ kernel.T + w["encoder.patch_embed.bias"]
    latent = vit(w, "encoder", patches, w["latent_tokens"])[1 + len(patches) :]
    columns = latent.reshape(ENCODER[0], TOKENS) if is_legacy else latent.T
    out = w["encoder.conv_out.weight"][..., 0, 0] @ columns + w["encoder.conv_out.bias"][:, None]
    return out.T


def decoded(w, codes):
    """[V or 3 p p, 4, 4] of the tokens [L, C] of one image."""
    tokens = F.linear(codes, w["decoder.decoder_embed.weight"], w["decoder.decoder_embed.bias"])
    patches = w["decoder.mask_token"][0].expand(16, -1)
    x = vit(w, "decoder", patches, tokens)[1:17].T.reshape(-1, 4, 4)
    x = F.conv2d(x[None], w["decoder.ffn.0.weight"], w["decoder.ffn.0.bias"])
    if "decoder.ffn.2.weight" in w:
        x = F.conv2d(x.tanh(), w["decoder.ffn.2.weight"], w["decoder.ffn.2.bias"])
    return x[0]


def proxy_pixels(w, x):
    """MaskGIT's decoder; its shortcut sees the block's output."""
    get = lambda name: w[f"pixel_decoder.{name}"]  # noqa: E731

    def norm(x, name):
        return F.silu(F.group_norm(x, 32, get(f"{name}.weight"), get(f"{name}.bias"), 1e-6))

    def block(x, at):
        h = F.conv2d(norm(x, f"{at}.norm1"), get(f"{at}.conv1.weight"), padding=1)
        h = F.conv2d(norm(h, f"{at}.norm2"), get(f"{at}.conv2.weight"), padding=1)
        if f"pixel_decoder.{at}.nin_shortcut.weight" in w:
            return h + F.conv2d(h, get(f"{at}.nin_shortcut.weight"))
        return h + x

    def conv(x, name):
        return F.conv2d(x, get(f"{name}.weight"), get(f"{name}.bias"), padding=1)

    x = conv(x, "conv_in")
    for at in ("mid.0", "mid.1", "up.2.block.0", "up.2.block.1", "up2", "up.1.block.0",
               "up.1.block.1", "up1", "up.0.block.0", "up.0.block.1"):  # fmt: skip
        if at in ("up2", "up1"):
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = conv(x, f"up.{at[2]}.upsample_conv")
        else:
            x = block(x, at)
    return conv(norm(x, "norm_out"), "conv_out")


@torch.no_grad()
def test_the_first_checkpoints(tmp_path):
    """Mutations: tokens turned before the projection; the likeliest code; [-1, 1] images; a
    shortcut of the input."""
    w = weights("legacy")
    tokenizer = load_pretrained(f"titok_published:{saved(tmp_path, 'legacy')}")
    codes = F.normalize(w["quantize.embedding.weight"], dim=-1)
    tokens = tokenizer.encode(images())
    drawn = tokenizer(images()).reconstruction  # before it is clamped
    for number, image in enumerate(images()):
        unit = F.normalize(features(w, image, True), dim=-1)
        torch.testing.assert_close(tokens.features[number], unit, atol=1e-5, rtol=1e-5)
        ids = (unit[:, None] - codes).square().sum(-1).argmin(-1)
        assert torch.equal(tokens.ids[number], ids)
        share = decoded(w, codes[ids]).softmax(0)
        grid = torch.einsum("vhw,vc->chw", share, w["pixel_quantize.embedding.weight"])
        pixels = proxy_pixels(w, grid[None])[0]
        torch.testing.assert_close(drawn[number], pixels, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_pixel_checkpoints(tmp_path):
    """Mutation: a patch read as (channel, row, column)."""
    w = weights("pixels")
    tokenizer = PublishedTiTok.from_published(saved(tmp_path, "pixels"))
    tokens, drawn = tokenizer.encode(images()), tokenizer(images()).reconstruction
    for number, image in enumerate(images()):
        found = features(w, image, False)
        torch.testing.assert_close(tokens.features[number], found, atol=1e-5, rtol=1e-5)
        ids = (found[:, None] - w["quantize.embedding.weight"]).square().sum(-1).argmin(-1)
        assert torch.equal(tokens.ids[number], ids)
        numbers = decoded(w, w["quantize.embedding.weight"][ids])
        flat = torch.zeros(3, SIZE, SIZE)
        for row in range(SIZE):
            for column in range(SIZE):
                at = 3 * (4 * (row % 4) + column % 4)
                flat[:, row, column] = numbers[at : at + 3, row // 4, column // 4]
        pixels = F.conv2d(flat, w["decoder.conv_out.weight"], w["decoder.conv_out.bias"], padding=1)
        torch.testing.assert_close(drawn[number], pixels, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_gaussian_checkpoints(tmp_path):
    w = weights("vae")
    tokenizer = PublishedTiTok.from_published(saved(tmp_path, "vae"))
    tokens = tokenizer.encode(images())
    mean, log_var = features(w, images()[0], False).chunk(2, dim=-1)
    torch.testing.assert_close(tokens.embeddings[0], mean, atol=1e-5, rtol=1e-5)
    draw = tokenizer.encode(images(), sample=True, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(2, TOKENS, TOKEN_DIM, generator=torch.Generator().manual_seed(3))
    by_hand = mean + (log_var / 2).exp() * noise[0]
    torch.testing.assert_close(draw.embeddings[0], by_hand, atol=1e-5, rtol=1e-5)


def test_the_names_of_titok_l_32_are_all_there():
    """The defaults are TiTok-L-32's: two ViT-L of 24 blocks; 16 heads of 64."""
    with torch.device("meta"):
        tokenizer = PublishedTiTok(TiTokConfig())
    shapes = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    assert shapes["encoder.transformer.23.attn.in_proj_weight"] == (3072, 1024)
    assert tokenizer.encoder.transformer[0].attn.num_heads == 16
    assert shapes["encoder.conv_out.weight"] == (12, 1024, 1, 1)
    assert shapes["decoder.ffn.2.weight"] == (1024, 2048, 1, 1)
    assert shapes["pixel_decoder.up.4.upsample_conv.weight"] == (512, 512, 3, 3)
    assert shapes["pixel_decoder.up.3.block.0.nin_shortcut.weight"] == (256, 256, 1, 1)
    assert "pixel_decoder.up.0.upsample_conv.weight" not in shapes


def test_what_does_not_fit_is_named(tmp_path):
    folder = saved(tmp_path, "legacy")
    file = folder / "model.safetensors"
    state = load_file(file)
    for missing in ("latent_tokens", "decoder.mask_token", "quantize.embedding.weight"):
        save_file({k: v for k, v in state.items() if k != missing}, file)
        with pytest.raises(ValueError, match=f"{missing} is missing"):
            PublishedTiTok.from_published(folder)
    save_file(state | {"extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="extra is unknown"):
        PublishedTiTok.from_published(folder)
    saved(tmp_path, "legacy", finetune_decoder=False)
    with pytest.raises(ValueError, match="first stage"):
        PublishedTiTok.from_published(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no 'model'.*is it TiTok's"):
        PublishedTiTok.from_published(folder)
