"""Teachers: frozen copies, their grids, and timm's networks by name."""

import pytest
import torch
from torch import nn

from tokenizers_vis.teachers import cosine_distance, frozen, on_grid, timm_teacher


def test_a_frozen_network_stays_what_it_was():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Dropout(0.5))
    teacher = frozen(network)
    images = torch.rand(4, 3, 2, 2)
    before = teacher(images)
    with torch.no_grad():
        network[1].weight.zero_()  # mutation: keep the network and not a copy
    teacher.train()  # mutation: dropout comes back
    assert torch.equal(teacher(images), before)
    assert not before.requires_grad
    assert all(p.requires_grad for p in network.parameters())


def test_features_of_the_image_stand_everywhere_and_grids_are_resized():
    whole = torch.tensor([[1.0, 2.0]])
    assert on_grid(whole, 3).tolist() == [[[1.0, 2.0]] * 9]
    grid = torch.arange(16.0).view(1, 16, 1)
    assert torch.equal(on_grid(grid, 4), grid)
    # A filtered bilinear resize of a linear ramp keeps its mean and its order.
    half = on_grid(grid, 2)[0, :, 0]
    assert half.mean().item() == pytest.approx(7.5)
    assert half[1] > half[0] and half[2] - half[0] == pytest.approx(4 * (half[1] - half[0]).item())


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 4, 4)])
def test_features_of_no_square_grid_are_refused(shape):
    with pytest.raises(ValueError, match="square grid"):
        on_grid(torch.zeros(shape), 2)


def test_cosine_distance_by_hand_and_without_gradient_to_the_teacher():
    told = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], requires_grad=True)
    wanted = torch.tensor([[1.0, 0.0]] * 3, requires_grad=True)
    found = cosine_distance(told, wanted)
    assert found.tolist() == pytest.approx([0, 1, 2])
    found.sum().backward()
    assert wanted.grad is None


@pytest.mark.parametrize(("name", "tokens"), [("test_vit", 16), ("test_resnet", 4)])
def test_timm_networks_give_patches(name, tokens):
    teacher = timm_teacher(name, image_size=64, is_pretrained=False)
    features = teacher(torch.rand(2, 3, 32, 32))
    assert features.shape[:2] == (2, tokens)  # without class and register tokens
    assert not features.requires_grad
