"""The perceptual loss on a VGG-16 of random weights, which shows its arithmetic and no more."""

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis.addons.perceptual import Perceptual
from tokenizers_vis.registry import make_tokenizer
from tokenizers_vis.training import TokenizerTraining

torchvision = pytest.importorskip("torchvision")
GRID = {"image_size": 16, "channels": (8, 16), "vocab": 16}
WIDTHS = (64, 128, 256, 512, 512)


def empty_vgg():
    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None, init_weights=False).features
    return features.to_empty(device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights in the two files' true layouts."""
    folder = tmp_path_factory.mktemp("vgg")
    torch.manual_seed(0)
    features = empty_vgg()
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=(2 / 9 / layer.in_channels) ** 0.5)
            torch.nn.init.zeros_(layer.bias)
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(state, folder / "vgg16.pth")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate(WIDTHS)}
    torch.save(heads, folder / "heads.pth")
    return folder / "vgg16.pth", folder / "heads.pth"


@pytest.fixture(scope="module")
def loss(files):
    return Perceptual(weights=files[0], heads=files[1])


def test_it_is_the_distance_of_unit_features_after_five_layers(files, loss):
    # A naive oracle on torchvision's own network. Kills: a layer too early or late, features that
    # an in-place ReLU has overwritten, heads that are left out.
    vgg = empty_vgg()
    vgg.load_state_dict({k.removeprefix("features."): v for k, v in torch.load(files[0]).items()})
    heads = torch.load(files[1])
    a, b = torch.rand(2, 2, 3, 32, 32).unbind(0)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = torch.zeros(2)
    with torch.no_grad():
        for number, last_relu in enumerate((3, 8, 15, 22, 29)):
            x = F.normalize(vgg[: last_relu + 1]((a - mean) / std), dim=1)
            y = F.normalize(vgg[: last_relu + 1]((b - mean) / std), dim=1)
            head = heads[f"lin{number}.model.1.weight"]
            expected += ((x - y).square() * head).sum(1).mean((1, 2))
        assert torch.allclose(loss.distance(a, b), expected, rtol=1e-4)
        assert torch.equal(loss.distance(a, a), torch.zeros(2))


def test_the_tokenizer_learns_from_it_and_vgg_does_not(loss):
    torch.manual_seed(0)
    training = TokenizerTraining(make_tokenizer("grid", GRID), addons={"perceptual": loss})
    output = training.train()(torch.rand(2, 3, 16, 16), progress=0.0)
    output.losses["perceptual"].value.backward()
    assert any(p.grad is not None and p.grad.any() for p in training.tokenizer.decoder.parameters())
    assert not any(p.requires_grad for p in loss.parameters()) and not loss.training


def test_clips_are_judged_frame_by_frame(loss):
    a, b = torch.rand(2, 1, 3, 3, 16, 16).unbind(0)
    with torch.no_grad():
        assert torch.allclose(loss.distance(a, b), loss.distance(a[0], b[0]), rtol=1e-4)


def test_missing_and_wrong_files_are_refused(files, loss, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        Perceptual(weights=tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="torchvision's vgg16"):
        Perceptual(weights=files[1])
    with pytest.raises(ValueError, match="LPIPS's heads"):
        Perceptual(weights=files[0], heads=files[0])
    small = make_tokenizer("grid", {**GRID, "image_size": 8})
    with pytest.raises(ValueError, match="16 pixels"):
        loss.attach(small)
