"""Feature networks and LPIPS from files of their true layouts, with random weights; no download.

Kills, among others: pictures in [0, 1] where the network wants [-1, 1]; a silent fall-back when
Inception was asked for; heads that meet another layer's features.
"""

import pytest
import torch
import torchvision
from torch import nn

from flowrl.errors import ConfigError
from flowrl.tokenizer.evaluation import features as networks
from flowrl.tokenizer.evaluation.features import feature_rows, load_features
from flowrl.tokenizer.evaluation.perceptual import load_lpips


def images(num=2, size=32):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    return tmp_path / "hub" / "checkpoints"


def inception(file, num_classes=1000):
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(
        weights=None, init_weights=False, aux_logits=True, num_classes=num_classes
    ).eval()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), file)
    return network


def test_inception_is_found_in_the_cache_and_sees_images_in_minus_one_to_one(empty_cache):
    network = inception(empty_cache / "inception_v3_google-0cc3c7bd.pth")
    found = load_features("auto")
    assert found.name == "Inception v3 (ImageNet)"
    network.fc = nn.Identity()
    large = nn.functional.interpolate(images(), (299, 299), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = network(large * 2 - 1)
    rows = feature_rows(found, images())
    assert rows.shape == (2, 2048) and torch.allclose(rows, expected, atol=1e-4)
    assert not torch.allclose(rows[0], rows[1])


def test_what_is_not_there_is_refused(empty_cache):
    with pytest.raises(ConfigError, match="neither in torch's nor in the Hub's cache"):
        load_features("inception")
    with pytest.raises(ConfigError, match="expected auto, inception, shapes or a file"):
        load_features("shaeps")


def test_fids_own_weights_are_refused_as_a_state_dict(tmp_path):
    inception(tmp_path / "pt_inception.pth", num_classes=1008)
    with pytest.raises(ConfigError, match=r"inception-2015-12-05\.pt"):
        load_features(str(tmp_path / "pt_inception.pth"))


class _Script(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


class _FidScript(nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8
        assert return_features
        return images.float().mean((2, 3))


def test_torchscript_is_called_as_it_was_made_to_be(tmp_path):
    for name, module, scale in (("plain", _Script(), 1), ("fid", _FidScript(), 255)):
        torch.jit.script(module).save(str(tmp_path / f"{name}.pt"))
        rows = feature_rows(load_features(str(tmp_path / f"{name}.pt")), images())
        assert torch.allclose(rows, images().mean((2, 3)) * scale, atol=scale * 2e-3)
    assert load_features(str(tmp_path / "fid.pt")).name == "Inception (FID)"


def test_features_of_clips_are_those_of_their_frames():
    network = networks.FeatureNetwork("mean", "", lambda x: x.mean((2, 3)))
    clips = torch.rand(3, 4, 3, 8, 8)
    assert torch.equal(feature_rows(network, clips), clips.flatten(0, 1).mean((2, 3)))


def lpips_files(folder, kind="alex"):
    torch.manual_seed(0)
    maker, channels = {
        "alex": (torchvision.models.alexnet, (64, 192, 384, 256, 256)),
        "vgg": (torchvision.models.vgg16, (64, 128, 256, 512, 512)),
    }[kind]
    network = maker(weights=None).eval()
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    torch.save(heads, folder / "heads.pth")
    torch.save(network.state_dict(), folder / "backbone.pth")
    return network, list(heads.values())


def test_lpips_is_the_papers_sum_over_layers(tmp_path):
    """Against the formula written out, with features taken by hooks on the activations."""
    network, heads = lpips_files(tmp_path)
    lpips = load_lpips(str(tmp_path / "heads.pth"), str(tmp_path / "backbone.pth"))
    seen = []
    for number in (1, 4, 7, 9, 11):
        network.features[number].inplace = False
        network.features[number].register_forward_hook(lambda m, i, out: seen.append(out))
    first, second = images(2, 64), images(4, 64)[2:]
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    with torch.no_grad():
        for each in (first, second):
            network.features((each * 2 - 1 - shift) / scale)
        expected = torch.zeros(2)
        for a, b, head in zip(seen[:5], seen[5:], heads, strict=True):
            a, b = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in (a, b))
            expected += ((a - b) ** 2 * head).sum(1).mean((1, 2))
        found = lpips(first, second)
        assert torch.allclose(found, expected, rtol=1e-4)
        assert (found > 0).all() and lpips(first, first).abs().max() == 0


def test_lpips_of_other_files_is_refused(tmp_path, empty_cache):
    lpips_files(tmp_path)
    torch.save({"lin0.model.1.weight": torch.rand(1, 7, 1, 1)}, tmp_path / "odd.pth")
    with pytest.raises(ConfigError, match="expected five heads"):
        load_lpips(str(tmp_path / "odd.pth"))
    with pytest.raises(ConfigError, match="there is no such file"):
        load_lpips(str(tmp_path / "none.pth"))
    with pytest.raises(ConfigError, match="name torchvision's weights by lpips_backbone"):
        load_lpips(str(tmp_path / "heads.pth"))
    with pytest.raises(ConfigError, match="does not fit torchvision's alex"):
        load_lpips(str(tmp_path / "heads.pth"), str(tmp_path / "heads.pth"))
