"""FlexTok's released format: names and wiring, and equal to a plain reading of what parts do."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from tests.tokenizers.published import FLEXTOK_RELEASED, KL, flextok
from tokenizers_vis.published.flextok import SECTIONS, PublishedFlexTok, projected_guidance
from tokenizers_vis.registry import load_pretrained
from tokenizers_vis.tokenizer import Solver

DIM, DEPTH, NUM, HEAD, HIDDEN = 32, 2, 4, 16, 85  # 85 = int(2 * int(32 * 4) / 3)
LEVELS = torch.tensor([8, 5])


def layout():
    """{name: shape} of encoder and decoder, written from the released code."""
    shapes = {
        "encoder.module_dict.enc_posemb_module.posembs": (1, DIM, 4, 4),
        "encoder.module_dict.enc_register_module.registers": (NUM, DIM),
        "decoder.module_dict.dec_registers_posemb_module.posembs": (1, 1, DIM, NUM),
        "decoder.module_dict.dec_patches_posemb_module.posembs": (1, DIM, 4, 4),
        "decoder.module_dict.dec_nested_dropout.dropout_mask_token": (DIM,),
        "decoder.module_dict.dec_latent_dropout.nullcond": (DIM,),
    }
    linears = {
        "encoder.module_dict.enc_patch_emb.patch_proj": (DIM, 16),
        "encoder.module_dict.enc_to_latents.proj": (2, DIM),
        "decoder.module_dict.dec_from_latents.proj": (DIM, 2),
        "decoder.module_dict.dec_noise_patch_emb.patch_proj": (DIM, 16),
        "decoder.module_dict.dec_time_embedder.mlp.0": (DIM, 16),
        "decoder.module_dict.dec_time_embedder.mlp.2": (DIM, DIM),
        "decoder.module_dict.dec_to_patches.adaLN_modulation.1": (2 * DIM, DIM),
        "decoder.module_dict.dec_to_patches.proj": (16, DIM),
    }
    for side in ("encoder", "decoder"):
        for block in range(DEPTH):
            at = f"{side}.module_dict.{side[:3]}_transformer.blocks.{block}"
            for name in ("wq", "wk", "wv", "proj"):
                shapes[f"{at}.attn.{name}.weight"] = (DIM, DIM)
            shapes |= {f"{at}.mlp.fc1.weight": (HIDDEN, DIM), f"{at}.mlp.fc3.weight": (HIDDEN, DIM)}
            shapes[f"{at}.mlp.fc2.weight"] = (DIM, HIDDEN)
            if side == "decoder":
                linears[f"{at}.adaLN_modulation.1"] = (2 * 6 * DIM, DIM)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def weights():
    generator = torch.Generator().manual_seed(0)
    found = {k: 0.3 * torch.randn(shape, generator=generator) for k, shape in layout().items()}
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(KL)
    return found | {f"vae.vae.{name}": value for name, value in vae.state_dict().items()}


def saved(path, sections=None, *, in_metadata=True):
    sections = sections or flextok(DIM, DEPTH, NUM)
    metadata = {name: str(part) for name, part in sections.items()} if in_metadata else None
    path.mkdir(exist_ok=True)
    save_file(weights(), path / "model.safetensors", metadata=metadata)
    if not in_metadata:
        (path / "config.json").write_text(json.dumps(sections))
    return path


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def norm(x):
    return F.layer_norm(x, x.shape[-1:])


def block(w, at, x, sees, modulation=None):
    """One block of a sequence [N, D]; sees [N, N]; modulation [N, 6, D]."""
    gate, mlp_gate, shift, scale, mlp_shift, mlp_scale = (
        modulation.unbind(1) if modulation is not None else (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    )
    inner = norm(x) * (1 + scale) + shift
    heads = []
    for head in range(DIM // HEAD):
        part = slice(HEAD * head, HEAD * (head + 1))
        q, k, v = ((inner @ w[f"{at}.attn.{n}.weight"].T)[:, part] for n in ("wq", "wk", "wv"))
        scores = (norm(q) @ norm(k).T) * 8 / HEAD
        heads.append(scores.masked_fill(~sees, -math.inf).softmax(-1) @ v)
    x = x + gate * (torch.cat(heads, -1) @ w[f"{at}.attn.proj.weight"].T)
    inner = norm(x) * (1 + mlp_scale) + mlp_shift
    hidden = F.silu(inner @ w[f"{at}.mlp.fc1.weight"].T) * (inner @ w[f"{at}.mlp.fc3.weight"].T)
    return x + mlp_gate * (hidden @ w[f"{at}.mlp.fc2.weight"].T)


def patches(w, at, latents, posemb):
    """[16, D] of one image's latents [4, 8, 8]."""
    found = []
    for row in range(4):
        for column in range(4):
            cell = latents[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            flat = cell.permute(1, 2, 0).flatten()  # row, column, channel
            place = w[posemb][0, :, row, column]
            found.append(F.linear(flat, w[f"{at}.weight"], w[f"{at}.bias"]) + place)
    return torch.stack(found)


def features(w, latents):
    """[NUM, 2] before quantisation."""
    e = "encoder.module_dict"
    x = patches(w, f"{e}.enc_patch_emb.patch_proj", latents, f"{e}.enc_posemb_module.posembs")
    x = torch.cat([x, w[f"{e}.enc_register_module.registers"]])
    sees = torch.tensor([[s < 16 or s <= q for s in range(20)] for q in range(20)])
    for number in range(DEPTH):
        x = block(w, f"{e}.enc_transformer.blocks.{number}", x, sees)
    head = f"{e}.enc_to_latents.proj"
    return F.linear(norm(x[16:]), w[f"{head}.weight"], w[f"{head}.bias"])


def quantized(z):
    """Codes and ids of FSQ, arXiv:2309.15505, appendix A."""
    half, offset = (LEVELS - 1) * 1.001 / 2, torch.tensor([0.5, 0.0])
    rounded = ((z + (offset / half).atanh()).tanh() * half - offset).round()
    return rounded / (LEVELS // 2), ((rounded + LEVELS // 2) * torch.tensor([1, 8])).sum(-1).long()


def velocity(w, x_t, sigma, codes, kept, *, is_null=False):
    """[4, 8, 8] at one image's noisy latents, of which the first `kept` codes are seen."""
    d = "decoder.module_dict"
    tokens = F.linear(
        codes, w[f"{d}.dec_from_latents.proj.weight"], w[f"{d}.dec_from_latents.proj.bias"]
    )
    tokens = tokens + w[f"{d}.dec_registers_posemb_module.posembs"][0, 0].T
    tokens[kept:] = w[f"{d}.dec_nested_dropout.dropout_mask_token"]
    if is_null:
        tokens[:] = w[f"{d}.dec_latent_dropout.nullcond"]
    x = patches(
        w, f"{d}.dec_noise_patch_emb.patch_proj", x_t, f"{d}.dec_patches_posemb_module.posembs"
    )
    x = torch.cat([x, tokens])
    angle = sigma * 256.0 ** -(torch.arange(8) / 8)
    time = torch.cat([angle.cos(), angle.sin()])
    for layer in (0, 2):
        at = f"{d}.dec_time_embedder.mlp.{layer}"
        time = F.linear(time if layer == 0 else F.silu(time), w[f"{at}.weight"], w[f"{at}.bias"])
    for number in range(DEPTH):
        at = f"{d}.dec_transformer.blocks.{number}"
        last = f"{at}.adaLN_modulation.1"
        numbers = F.linear(F.silu(time), w[f"{last}.weight"], w[f"{last}.bias"]).view(2, 6, DIM)
        kinds = torch.tensor([0] * 16 + [1] * NUM)
        x = block(w, at, x, torch.ones(20, 20, dtype=torch.bool), numbers[kinds])
    last = f"{d}.dec_to_patches.adaLN_modulation.1"
    shift, scale = F.linear(F.silu(time), w[f"{last}.weight"], w[f"{last}.bias"]).chunk(2)
    head = f"{d}.dec_to_patches.proj"
    x = F.linear(norm(x[:16]) * (1 + scale) + shift, w[f"{head}.weight"], w[f"{head}.bias"])
    out = torch.zeros(4, 8, 8)
    for number, patch in enumerate(x):
        row, column = divmod(number, 4)
        cell = patch.view(2, 2, 4).permute(2, 0, 1)
        out[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = cell
    return out


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_it_is_the_released_encoder(tmp_path):
    """Mutations: a patch as (channel, row, column); scale head_dim^-0.5; a register that sees the
    next; the VAE's latents unscaled."""
    w, tokenizer = weights(), PublishedFlexTok.from_published(saved(tmp_path / "a"))
    vae = AutoencoderKL.from_config(KL).eval()
    vae.load_state_dict({k[8:]: v for k, v in w.items() if k.startswith("vae.vae.")})
    latents = 0.5 * vae.encode(images() * 2 - 1).latent_dist.mean
    tokens = tokenizer.encode(images())
    for number in range(2):
        z = features(w, latents[number])
        close(tokens.features[number], z)
        codes, ids = quantized(z)
        assert torch.equal(tokens.ids[number], ids)
        assert torch.equal(tokens.embeddings[number], codes)
    assert tokenizer.codebooks[0].vocab == 40 and len(tokens.ids.unique()) > 2


@pytest.mark.parametrize(("kept", "is_null"), [(4, False), (2, False), (3, True)])
@torch.no_grad()
def test_it_is_the_released_decoder(tmp_path, kept, is_null):
    """Mutations: gates behind shifts and scales; one modulation for both kinds; a mask token that
    has a place; a lowest frequency of 1 / 10000."""
    w, tokenizer = weights(), PublishedFlexTok.from_published(saved(tmp_path / "a"))
    ids = torch.tensor([[3, 17, 39, 0], [8, 1, 22, 30]])
    tokens = tokenizer.tokens_from_ids(ids[:, :kept])
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.3, 0.9])
    hidden = torch.tensor([is_null, False])
    found = tokenizer.velocity(x_t, sigma, tokens, is_null=hidden)
    for number in range(2):
        codes = torch.stack([ids[number] % 8, ids[number] // 8], -1) / (LEVELS // 2) - 1
        null = bool(hidden[number])
        expected = velocity(w, x_t[number], sigma[number], codes, kept, is_null=null)
        close(found[number], expected)


@torch.no_grad()
def test_sampling_is_euler_with_projected_guidance(tmp_path):
    """Two steps by hand. Mutations: momentum that is kept at 0; guidance s instead of s - 1."""
    tokenizer = PublishedFlexTok.from_published(saved(tmp_path / "a"))
    tokens = tokenizer.encode(images(), 3)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    before = torch.zeros_like(x)
    for sigma in (1.0, 0.5):
        times, null = torch.full((2,), sigma), torch.ones(2, dtype=torch.bool)
        seen = tokenizer.velocity(x, times, tokens)
        before = seen - tokenizer.velocity(x, times, tokens, is_null=null) - 0.5 * before
        step = before * (2.5 / before.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None]
        unit = F.normalize(seen.flatten(1)).view_as(seen)
        step = step - (step * unit).flatten(1).sum(1)[:, None, None, None] * unit
        x = x - 0.5 * (seen + 2.0 * step)
    expected = ((tokenizer.vae.vae.decode(x / 0.5).sample + 1) / 2).clamp(0, 1)
    generator = torch.Generator().manual_seed(9)
    close(tokenizer.decode(tokens, solver=Solver(2, 3.0), generator=generator), expected)


def test_projected_guidance_is_bounded_and_orthogonal():
    velocity = torch.zeros(1, 1, 1, 2)
    velocity[..., 0] = 2.0
    difference = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)  # of length 5, so halved to (1.5, 2)
    close(projected_guidance(velocity, difference), torch.tensor([0.0, 2.0]).view(1, 1, 1, 2))


def test_metadata_and_config_json_say_the_same(tmp_path):
    first = load_pretrained(f"flextok_published:{saved(tmp_path / 'a')}")
    alone = load_pretrained(f"flextok_published:{tmp_path / 'a' / 'model.safetensors'}")
    second = PublishedFlexTok.from_published(saved(tmp_path / "b", in_metadata=False))
    assert first.config == second.config == alone.config
    assert first.config.image_size == 16 and first.config.autoencoder == KL
    assert first.token_counts == (1, 2, 3, 4) and first.config.solver == Solver(20, 7.5)
    assert set(FLEXTOK_RELEASED) > set(SECTIONS)


def test_the_table_of_sines_is_the_released_one():
    """Rows first: sin and cos of the row, then of the column. Mutation: columns first."""
    from tokenizers_vis.published.flextok_parts import _sines

    table = _sines(2, 3, dim=8)
    assert table.shape == (1, 8, 2, 3)
    expected = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    expected += [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    close(table[0, :, 1, 2], torch.tensor(expected))


@pytest.mark.parametrize(
    ("section", "part", "change", "message"),
    [
        ("encoder", "enc_transformer", {"_target_": "os.system"}, "os.system is not known"),
        ("encoder", "enc_transformer", {"colour": 1}, "enc_transformer.*colour"),
        ("encoder", "enc_seq_packer", {"mask_mode": "diagonal"}, "mask_mode diagonal"),
        ("encoder", "enc_to_latents", {"use_mup_readout": True}, "use_mup_readout"),
        ("encoder", "enc_transformer", {"rope_forward_read_key": "a"}, "rope_forward_read_key"),
        ("decoder", "dec_latent_dropout", {"replace_with_single_token": True}, "single token"),
        ("decoder", "dec_transformer", {"act_layer": {"_target_": "torch.nn.GELU"}}, "act_layer"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, section, part, change, message):
    """Nothing that a file names is called. Mutation: an import of _target_."""
    sections = copy.deepcopy(flextok(DIM, DEPTH, NUM))
    sections[section]["module_dict"][part] |= change
    with pytest.raises(ValueError, match=message):
        PublishedFlexTok.from_published(saved(tmp_path / "a", sections))


def test_what_does_not_fit_is_named(tmp_path):
    folder = saved(tmp_path / "a", in_metadata=False)
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "decoder.module_dict.dec_latent_dropout.nullcond"
    save_file({k: v for k, v in state.items() if k != name}, file)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        PublishedFlexTok.from_published(folder)
    save_file(state | {"extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="extra is unknown"):
        PublishedFlexTok.from_published(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no vae, encoder, decoder"):
        PublishedFlexTok.from_published(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json beside"):
        PublishedFlexTok.from_published(file)
