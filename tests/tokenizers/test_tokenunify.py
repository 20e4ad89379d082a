"""TokenUnify: what each objective sees, its losses by hand, and the free-running roll-out."""

from dataclasses import replace

import pytest
import torch

from tokenizers_vis.tokenunify import TokenUnify, TokenUnifyConfig

SMALL = TokenUnifyConfig(image_size=16, patch_size=8, width=16, num_heads=2, depth=2)
K = 4


def tokenunify(**changes):
    torch.manual_seed(0)
    return TokenUnify(replace(SMALL, **changes))


def images(num=3):
    return torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def influence(out, patches):
    """Bool [rows, K]: which patches [1, K, D] each row of out [rows, D] depends on."""
    direction = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(2))
    gradients = [
        torch.autograd.grad(row @ direction, patches, retain_graph=True)[0][0] for row in out
    ]
    return torch.stack([(gradient != 0).any(-1) for gradient in gradients])


def test_a_prefix_knows_nothing_of_what_follows():
    # Killed by a trunk without its mask, and by reading h_{n+1} for h_n.
    model = tokenunify()
    patches = model.patches(images(1)).requires_grad_()
    before = torch.ones(K, K).tril(-1).bool()
    assert torch.equal(influence(model.predict_next(patches)[0], patches), before)
    states = model.states(patches)
    assert states.shape == (1, K + 1, 16)
    for known in range(K):
        rows = influence(model.predict_all(states[:, known : known + 1])[0, 0], patches)
        assert torch.equal(rows, (torch.arange(K) < known).expand(K, K))


def test_hidden_patches_are_told_by_those_on_both_sides_and_not_by_themselves():
    model = tokenunify()
    patches = model.patches(images(1)).requires_grad_()
    hidden = torch.tensor([[False, True, True, False]])
    assert torch.equal(
        influence(model.predict_hidden(patches, hidden)[0], patches), (~hidden).expand(K, K)
    )


def test_the_losses_are_means_over_what_each_objective_predicts():
    # Heads that always say 0: the error of a patch is the mean of its squares. Patch 1 of 4 is
    # black (-1: error 1), the others grey (0: error 0).
    model = tokenunify()
    for head in (model.random_head, model.next_head, model.all_head.down):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    picture = torch.full((1, 3, 16, 16), 0.5)
    picture[:, :, :8, 8:] = 0  # the second patch
    with torch.no_grad():
        losses = model(picture, generator=torch.Generator().manual_seed(0)).losses
    hidden = model.draw_hidden(1, torch.Generator().manual_seed(0))
    assert hidden.sum() == 2
    assert float(losses["random"].value) == pytest.approx(float(hidden[0, 1]) / 2)
    assert float(losses["next"].value) == pytest.approx(1 / 4)
    # Patch j of 1..4 remains behind j prefixes: 10 pairs, 2 of them of the second patch. Killed by
    # a mask that forgets the next patch itself (6 pairs, 1) and by none (16 pairs, 4).
    assert float(losses["all"].value) == pytest.approx(2 / 10)


def test_all_prefixes_drawn_are_all_prefixes_and_fewer_are_some_of_them():
    picture = images()
    every = tokenunify()(picture).losses["all"].value
    drawn = tokenunify(num_prefixes=K)(picture, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(drawn.losses["all"].value, every, atol=1e-6)
    model = tokenunify(num_prefixes=1)
    patches = model.patches(picture[:1])
    with torch.no_grad():
        error = (model.predict_all(model.states(patches)[:, :K]) - patches[:, None]).square()
        each = [float(error[0, known, known:].mean()) for known in range(K)]
        for seed in range(4):
            found = model(picture[:1], generator=torch.Generator().manual_seed(seed))
            value = float(found.losses["all"].value)
            assert min(abs(value - one) for one in each) < 1e-5


def test_an_objective_without_weight_is_not_there():
    model = tokenunify(random_weight=0, all_weight=0, next_weight=2)
    output = model(images())
    assert set(output.losses) == {"next"}
    assert torch.equal(output.loss, 2 * output.losses["next"].value)
    output.loss.backward()
    assert model.next_head.weight.grad.any() and model.all_head.down.weight.grad is None


def test_every_parameter_learns_from_the_mixture():
    model = tokenunify()
    model(images(), generator=torch.Generator().manual_seed(0)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_the_roll_out_feeds_its_own_predictions_back():
    # Against full forwards without a cache. Killed by feeding true patches, or by a wrong place.
    model = tokenunify().eval()
    patches = model.patches(images())
    for known in range(K + 1):
        expected = patches[:, :known]
        for _ in range(known, K):
            expected = torch.cat([expected, model.next_head(model.states(expected)[:, -1:])], 1)
        found = model.roll_out(patches[:, :known])
        assert torch.allclose(found, expected, atol=1e-5)
    one_step = model.roll_out(patches[:, : K - 1])[:, -1]
    assert torch.allclose(one_step, model.predict_next(patches)[:, -1], atol=1e-5)


def test_hidden_patches_are_drawn_anew_for_every_image_and_are_as_many():
    model = tokenunify(hidden_share=0.75)
    hidden = model.draw_hidden(200, torch.Generator().manual_seed(0))
    assert (hidden.sum(1) == 3).all() and hidden.any(0).all()
    # Each place is hidden in three quarters of the images: 5 standard deviations are 0.15.
    assert ((hidden.float().mean(0) - 0.75).abs() < 0.15).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size 5"),
        ({"random_weight": 0, "next_weight": 0, "all_weight": 0}, "must be positive"),
        ({"hidden_share": 0.0}, "hidden_share"),
        ({"hidden_share": 1.0}, "hidden_share"),
        ({"num_prefixes": 5}, "num_prefixes"),
    ],
)
def test_numbers_that_make_no_objective_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenunify(**changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\]"):
        tokenunify()(torch.rand(1, 3, 16, 8))
