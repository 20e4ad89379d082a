"""Forward-process methods on a Stable Diffusion 3 as `flowrl.build` makes it: LoRA, and in full.

Kills, among others: adapters that `old` does not hold, or a reference that is not the base; a
policy of the wrong kind; a wrapper's network that is not the one that is trained.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from flowrl.policies.forward import ForwardPolicy
from tests.artefacts.tiny_run import save_base, train, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forward")
    save_base(folder)
    return folder


@pytest.mark.parametrize(
    ("tuning", "method", "args"),
    [
        ("lora", "diffusion_nft", "{num_steps: 3, num_draws: 2, decay_slope: 0.3}"),
        ("full", "diffusion_nft", "{num_steps: 3, num_draws: 2, decay_slope: 0.3}"),
        ("lora", "dgpo", "{num_steps: 3, num_draws: 2, group_size: 4}"),
    ],
)
def test_it_trains_the_weights_it_should_and_keeps_the_other_sets(
    tuning: str, method: str, args: str, folder: Path
) -> None:
    config = write_config(
        folder,
        tuning,
        extra=f"""
        method: null
        run: {{name: {tuning}_{method}}}
        """,
    )
    chosen = [f"method.name={method}", f"method.args={args}"]
    trainer = train(config, *chosen, "optim.lr=0.003")
    assert isinstance(trainer.policy, ForwardPolicy)
    weights, network = trainer.policy.weights, trainer.policy.weights.network
    state = weights.state_dict()
    names = {name.removeprefix("current.") for name in state if name.startswith("current.")}
    assert {f"old.{name}" for name in names} == {n for n in state if n.startswith("old.")}
    assert all("lora_" in name for name in names) == (tuning == "lora")
    batch = trainer.sampler(5)
    _, trajectory = trainer.policy.rollout(batch, trainer.method.plan(5))
    index = torch.arange(4)

    def velocity(name: str) -> torch.Tensor:
        with torch.no_grad(), weights.use(name):
            return trainer.policy.evaluate(trajectory, index).velocity

    seen = {name: velocity(name) for name in ("current", "old", "reference")}
    for one, two in combinations(seen, 2):
        assert not torch.equal(seen[one], seen[two]), (one, two)
    assert torch.equal(velocity("current"), seen["current"])
    trainer.policy.evaluate(trajectory, index).velocity.sum().backward()
    trained = [p for p in network.parameters() if p.grad is not None]
    assert {id(p) for p in trained} <= {id(p) for p in weights.trainable()} and trained
