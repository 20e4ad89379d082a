"""Parameter sets: each is what it says inside its `with`, and all are back in place after it.

On the toy in full and on a tiny SD3 transformer with LoRA. Kills, among others: a swap that is not
undone on an error, or before the backward pass; a reference that is trained, or that moves; an
adapter that stays off, or frozen, after the reference; an average that lags or has no warm-up; an
old that keeps 1 - decay; a checkpoint of other names or shapes that is loaded in part; weights
trained in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowrl.errors import ConfigError
from flowrl.policies.weights import FrozenWeights, FullWeights, LoraWeights
from flowrl.toys import ToyFlowNetwork
from tests.policies.toy_flow import perturb

Weights = FullWeights | LoraWeights


def full(**changes: Any) -> FullWeights:
    torch.manual_seed(0)
    network = ToyFlowNetwork(8)
    perturb(network, 0.3, seed=1)
    return FullWeights(network, **{"with_reference": True, "ema_decay": 0.9, **changes})


def sd3(dtype: torch.dtype = torch.float32) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
    ).to(dtype)


def lora(network: nn.Module | None = None, **changes: Any) -> LoraWeights:
    settings: dict[str, Any] = {
        "rank": 2,
        "alpha": 4,
        "target_modules": ["attn.to_q", "attn.to_v"],
        "seed": 3,
        "ema_decay": 0.9,
    }
    return LoraWeights(network or sd3(), **{**settings, **changes})


def output(network: nn.Module) -> Tensor:
    """The network's answer to a fixed question."""
    generator = torch.Generator().manual_seed(9)
    if isinstance(network, ToyFlowNetwork):
        x = torch.randn(5, 2, generator=generator)
        return network(x, torch.full((5,), 0.5), torch.arange(5))
    return network(
        hidden_states=torch.randn(2, 4, 4, 4, generator=generator),
        timestep=torch.tensor([500.0, 500.0]),
        encoder_hidden_states=torch.randn(2, 3, 8, generator=generator),
        pooled_projections=torch.randn(2, 8, generator=generator),
        return_dict=False,
    )[0]


def move(weights: Weights, size: float = 0.3, seed: int = 4) -> None:
    """Stands for an optimiser's update."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in weights.trainable():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))


def values(weights: Weights) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in weights.trainable()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


BOTH = pytest.mark.parametrize("make", [full, lora])


@BOTH
@torch.no_grad()
def test_the_reference_is_the_base_whatever_was_trained(make: Callable[..., Weights]) -> None:
    weights = make()
    base = output(weights.network)
    move(weights)
    trained = output(weights.network)
    assert (trained - base).abs().max() > 1e-2
    with weights.use("reference"):
        assert torch.equal(output(weights.network), base)
    with weights.use("current"):
        assert torch.equal(output(weights.network), trained)
    assert torch.equal(output(weights.network), trained)


@torch.no_grad()
def test_an_adapter_begins_as_the_base_and_its_draw_depends_on_the_seed_alone() -> None:
    network = sd3()
    base = output(network)
    state = torch.get_rng_state()
    first = lora(network)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(output(first.network), base)  # other calls, so other rounding
    torch.manual_seed(77)
    assert equal(values(lora(sd3())), values(first))
    assert not equal(values(lora(sd3(), seed=4)), values(first))


def test_lora_trains_the_adapter_alone_and_full_everything() -> None:
    weights = lora()
    trained = {n for n, p in weights.network.named_parameters() if p.requires_grad}
    # Two factors of each of two projections in two blocks.
    assert len(trained) == 8 == len(list(weights.trainable()))
    assert all("lora_" in name and ("to_q" in name or "to_v" in name) for name in trained)
    assert len(list(full().trainable())) == len(list(ToyFlowNetwork(8).parameters()))


@BOTH
def test_a_reference_between_forward_and_backward_changes_no_gradient(
    make: Callable[..., Weights],
) -> None:
    weights = make()
    move(weights)
    base = [p.detach().clone() for p in make().network.parameters()]
    (output(weights.network) ** 2).sum().backward()
    expected = [parameter.grad.clone() for parameter in weights.trainable()]
    weights.network.zero_grad()
    new = output(weights.network)
    with torch.no_grad(), weights.use("reference"):
        output(weights.network)
    (new**2).sum().backward()
    assert equal([parameter.grad for parameter in weights.trainable()], expected)
    assert any(gradient.any() for gradient in expected)
    # Nothing of the reference has a gradient, nor has it moved.
    if isinstance(weights, FullWeights):
        reference = list(weights.reference.values())
    else:
        reference = [p for p in weights.network.parameters() if not p.requires_grad]
        base = [p for p in make().network.parameters() if not p.requires_grad]
    assert equal(reference, base)
    assert not any(value.requires_grad or value.grad is not None for value in reference)


@BOTH
@pytest.mark.parametrize("name", ["reference", "ema", "current"])
def test_an_error_inside_use_leaves_the_current_weights(
    make: Callable[..., Weights], name: str
) -> None:
    weights = make()
    move(weights)
    before, answer = values(weights), output(weights.network).detach()
    with pytest.raises(ZeroDivisionError), weights.use(name):
        raise ZeroDivisionError
    assert equal(values(weights), before)
    assert torch.equal(output(weights.network), answer)
    with torch.no_grad(), weights.use("reference"):  # and the sets have not changed places
        assert torch.equal(output(weights.network), output(make().network))


@BOTH
def test_the_average_by_hand(make: Callable[..., Weights]) -> None:
    # Decay min(.9, (1 + n) / (10 + n)): 2/11 after one update, 3/12 after two, .9 from n = 80 on.
    weights = make()
    average = values(weights)
    for n, decay in ((1, 2 / 11), (2, 3 / 12), (80, 0.9), (10_000, 0.9)):
        move(weights, seed=n)
        weights.update_ema(n)
        average = [
            decay * a + (1 - decay) * p for a, p in zip(average, values(weights), strict=True)
        ]
    current = values(weights)
    with weights.use("ema"):
        inside = values(weights)
        for have, want in zip(inside, average, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    assert equal(values(weights), current) and not equal(inside, current)
    with weights.use("ema"):  # a second time: looking at it has not moved it
        assert equal(values(weights), inside)


@BOTH
def test_the_average_does_not_share_memory_with_the_weights(make: Callable[..., Weights]) -> None:
    weights = make()
    with weights.use("ema"):
        before = values(weights)
    move(weights)
    with weights.use("ema"):
        assert equal(values(weights), before)


@BOTH
def test_state_round_trips_into_fresh_weights(make: Callable[..., Weights]) -> None:
    weights = make()
    move(weights)
    weights.update_ema(5)
    state = {name: value.clone() for name, value in weights.state_dict().items()}
    assert all(not value.requires_grad for value in state.values())
    fresh = make()
    parameters = list(fresh.trainable())
    fresh.load_state_dict(state)
    # In place: the optimiser holds these very parameters.
    assert all(a is b for a, b in zip(parameters, fresh.trainable(), strict=True))
    assert state.keys() == fresh.state_dict().keys()
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[name])
    for name in ("current", "ema", "reference"):
        with torch.no_grad(), weights.use(name), fresh.use(name):
            assert torch.equal(output(fresh.network), output(weights.network))


@BOTH
def test_another_runs_state_is_refused_and_nothing_is_copied(make: Callable[..., Weights]) -> None:
    weights = make()
    before = values(weights)
    move(other := make())
    good = {name: value.clone() for name, value in other.state_dict().items()}
    first = min(good)
    without = {name: value for name, value in good.items() if name != first}
    no_average = {name: value for name, value in good.items() if name.startswith("current")}
    stretched = {**good, first: good[first][..., :1]}  # copy_ would broadcast it
    for bad in (without, no_average, {**good, "current.more": torch.zeros(1)}, stretched):
        with pytest.raises(ConfigError, match="resume with the model, tuning and EMA"):
            weights.load_state_dict(bad)
        assert equal(values(weights), before)


@BOTH
def test_old_follows_by_hand_and_only_when_told(make: Callable[..., Weights]) -> None:
    weights = make(with_old=True)
    old = values(weights)
    for n, decay in enumerate((1.0, 0.0, 0.3, 0.999)):
        move(weights, seed=n)
        weights.update_ema(n)  # another set's business
        weights.update_old(decay)
        old = [decay * a + (1 - decay) * p for a, p in zip(old, values(weights), strict=True)]
        with weights.use("old"):
            for have, want in zip(values(weights), old, strict=True):
                torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    weights.update_old(0.0)
    with weights.use("old"):
        inside = values(weights)
    assert equal(inside, values(weights))  # to the bit: on-policy is on-policy
    move(weights)
    with weights.use("old"):
        assert equal(values(weights), inside)  # no shared memory


@BOTH
def test_old_survives_a_round_trip_and_is_not_left_out_or_added(
    make: Callable[..., Weights],
) -> None:
    weights = make(with_old=True)
    move(weights)
    weights.update_old(0.4)
    move(weights, seed=5)
    state = {name: value.clone() for name, value in weights.state_dict().items()}
    fresh = make(with_old=True)
    fresh.load_state_dict(state)
    for name in ("current", "ema", "old", "reference"):
        with torch.no_grad(), weights.use(name), fresh.use(name):
            assert torch.equal(output(fresh.network), output(weights.network))
    plain = {name: value for name, value in state.items() if not name.startswith("old.")}
    for keeper, wrong in ((make(), state), (make(with_old=True), plain)):
        with pytest.raises(ConfigError, match="method that keeps or does not keep 'old'"):
            keeper.load_state_dict(wrong)


def test_old_is_not_kept_unless_asked_for() -> None:
    with pytest.raises(ConfigError, match="use a method that keeps 'old'"):
        full().update_old(0.5)


def test_a_state_of_another_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora_[AB]"):
        lora(rank=2).load_state_dict(lora(rank=1).state_dict())


@pytest.mark.parametrize("name", ["ema", "old", "currant"])
def test_a_set_that_the_run_does_not_keep_is_named(name: str) -> None:
    weights = full(ema_decay=None)
    with pytest.raises(ConfigError, match=f"keeps no '{name}' weights"), weights.use(name):
        pass
    weights.update_ema(1)  # nothing to average
    assert not any(key.startswith("ema") for key in weights.state_dict())


def test_full_weights_without_a_reference_keep_no_copy() -> None:
    weights = full(with_reference=False)
    assert weights.reference is None
    with pytest.raises(ConfigError, match="keeps no reference copy"), weights.use("reference"):
        pass


def test_what_is_trained_is_held_in_float32_at_least() -> None:
    weights = lora(sd3(torch.bfloat16))
    kinds = {p.requires_grad: p.dtype for p in weights.network.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    for given, held in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        network = ToyFlowNetwork(8).to(given)
        assert {p.dtype for p in FullWeights(network, with_reference=False).trainable()} == {held}


def test_frozen_weights_train_nothing_and_are_left_as_they_are() -> None:
    network = ToyFlowNetwork(8).bfloat16()
    weights = FrozenWeights(network)
    assert not list(weights.trainable()) and weights.state_dict() == {}
    assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.bfloat16, False)}
    before = [p.clone() for p in network.parameters()]
    weights.update_ema(1)
    for name in ("current", "reference"):
        with weights.use(name):
            assert equal(list(network.parameters()), before)
    with pytest.raises(ConfigError, match="keeps no 'ema' weights"), weights.use("ema"):
        pass


def test_saving_writes_the_adapter_or_the_whole_model(tmp_path: Any) -> None:
    calls = []

    class Pipeline:
        def save_full(self, folder: Any) -> None:
            calls.append(("full", folder))

        def save_lora(self, folder: Any) -> None:
            calls.append(("lora", folder))

    full().save(Pipeline(), tmp_path)
    lora().save(Pipeline(), tmp_path)
    assert calls == [("full", tmp_path), ("lora", tmp_path)]
