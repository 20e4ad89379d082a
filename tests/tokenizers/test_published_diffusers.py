"""diffusers' autoencoders: folders as the library writes them, and equal to its own forward."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file

from tests.tokenizers.published import KL, VQ
from tokenizers_vis.published.diffusers_grid import DiffusersGrid
from tokenizers_vis.registry import load_pretrained


def written(path, numbers):
    """A random model of the library, saved by itself."""
    torch.manual_seed(0)
    model = (VQModel if numbers["_class_name"] == "VQModel" else AutoencoderKL).from_config(numbers)
    if numbers["_class_name"] == "VQModel":
        torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save_pretrained(path)
    return model.eval()


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("extra", "low", "high"), [({}, -1, 1), ({"lookup_from_codebook": True}, 0, 1)]
)
@torch.no_grad()
def test_a_vq_is_the_librarys_forward(tmp_path, extra, low, high):
    """Ids, codes, images, and aMUSEd's range. Mutation: decode() of the library, which reads
    aMUSEd's embeddings as ids."""
    model = written(tmp_path, {**VQ, **extra})
    assert load_pretrained(f"diffusers:{tmp_path}").sample_shape == (3, 256, 256)
    tokenizer = DiffusersGrid.from_published(tmp_path, image_size=16)
    seen = images() * (high - low) + low
    hidden = model.encode(seen).latents
    flat = hidden.permute(0, 2, 3, 1).flatten(1, 2)
    ids = (flat[:, :, None] - model.quantize.embedding.weight).square().sum(-1).argmin(-1)
    tokens = tokenizer.encode(images())
    assert torch.equal(tokens.ids, ids) and len(ids.unique()) > 2
    drawn = model(seen).sample if not extra else model.decode(
        ids, force_not_quantize=True, shape=(2, 8, 8, 3)
    ).sample  # fmt: skip
    expected = ((drawn - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(tokens), expected, atol=1e-5, rtol=0)


def test_the_loss_of_a_vq_is_the_librarys(tmp_path):
    model = written(tmp_path, VQ)
    tokenizer = DiffusersGrid.from_published(tmp_path, image_size=16)
    output, own = tokenizer(images()), model(images() * 2 - 1)
    torch.testing.assert_close(output.losses["codebook"].weighted, own.commit_loss)
    by_hand = ((own.sample + 1) / 2 - images()).square().mean()
    torch.testing.assert_close(output.losses["pixel_l2"].weighted, by_hand)


@torch.no_grad()
def test_a_kl_is_the_librarys_forward(tmp_path):
    """The mean, unscaled; a draw when asked. Mutation: scaling_factor, [0, 1] images."""
    model = written(tmp_path / "vae", KL)
    tokenizer = DiffusersGrid.from_published(tmp_path / "vae", image_size=16)
    posterior = model.encode(images() * 2 - 1).latent_dist
    tokens = tokenizer.encode(images())
    assert tokens.ids is None and tokenizer.bits == float("inf")
    mean = posterior.mean.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.embeddings, mean, atol=1e-6, rtol=0)
    drawn = tokenizer.encode(images(), sample=True, generator=torch.Generator().manual_seed(5))
    draw = posterior.sample(torch.Generator().manual_seed(5)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(drawn.embeddings, draw, atol=1e-6, rtol=0)
    expected = ((model.decode(posterior.mean).sample + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(tokens), expected, atol=1e-5, rtol=0)
    kl = tokenizer(images()).losses["kl"].weighted
    torch.testing.assert_close(kl, 1e-6 * posterior.kl().mean())


def test_what_does_not_fit_is_named(tmp_path):
    """Mutation: the library's own loading, which only warns."""
    written(tmp_path, VQ)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "quant_conv.bias"}, file)
    with pytest.raises(ValueError, match=r"quant_conv\.bias is missing"):
        DiffusersGrid.from_published(tmp_path)
    save_file(state | {"extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="extra is unknown"):
        DiffusersGrid.from_published(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ValueError, match="VQModel and AutoencoderKL, not AutoencoderTiny"):
        DiffusersGrid.from_published(tmp_path)
    with pytest.raises(FileNotFoundError, match="no Hub id"):
        DiffusersGrid.from_published("./nowhere")


def test_the_configuration_is_plain_data(tmp_path):
    written(tmp_path, KL)
    tokenizer = DiffusersGrid.from_published(tmp_path, image_size=16)
    assert json.loads(json.dumps(tokenizer.config_dict())) == tokenizer.config_dict()
    with pytest.raises(ValueError, match="does not divide by 2"):
        DiffusersGrid.from_published(tmp_path, image_size=17)
