"""A tokenizer's training: resumed, averaged, adversarial, stopped by what is not finite.

Kills, among others: a codebook that is not in the checkpoint; draws from a generator that a resume
does not restore; an adversary moved by the tokenizer's loss; an export of the wrong weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl.errors import ConfigError, NonFiniteError
from flowrl.pretrain.step import Learner
from flowrl.tokenizer.heldout import evaluate_held_out, psnr, shown_counts
from flowrl.tokenizer.images import to_float
from flowrl.train.statefiles import read_weights
from flowrl.train.track import read_metrics
from tests.tokenizer_cli.toys import FLEXTOK, FSQ, GRID, toy_run, write_config
from tokenizers_vis.registry import load_pretrained

ROOT = Path(__file__).resolve().parents[2]
CRITIC = {"name": "tests.tokenizer_cli.toys:Critic"}
LARP = {
    "name": "larp",
    "args": {
        "image_size": 16, "num_tokens": 4, "vocab": 16, "code_dim": 4, "dim": 16, "num_heads": 2,
        "encoder_depth": 1, "decoder_depth": 1,
    },
}  # fmt: skip
LARP_ADDONS = [
    {"name": "prior", "args": {"dim": 16, "depth": 1, "num_heads": 2}},
    {"name": "adversarial", "args": {"start": 0.3, "lecam": 0.1, "channels": [8, 8]}},
]


def rows(folder: Path) -> list[dict]:
    kept = ("step", "train/", "eval/")
    found = read_metrics(folder / "runs/toy/metrics.jsonl")
    return [{k: v for k, v in row.items() if k.startswith(kept)} for row in found]


def final(folder: Path) -> dict:
    return load_file(folder / "runs/toy/final/model.safetensors")


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "sections",
    [
        {"tokenizer": GRID, "addons": [CRITIC]},
        {"tokenizer": LARP, "addons": LARP_ADDONS},
        {
            "tokenizer": FLEXTOK,
            "dropout": {"mode": "pow2"},
            "data": {"source": "shapes", "num_images": 20, "flip": True},
        },
        {"tokenizer": FLEXTOK, "optim": {"lr": 1e-2, "muon_lr": 2e-2, "schedule": "linear"}},
    ],
    ids=[
        "vq with an adversary",
        "larp with prior and adversary",
        "flextok with dropout",
        "flextok by muon",
    ],
)
def test_a_run_that_was_killed_and_resumed_equals_an_uninterrupted_one(
    tmp_path, monkeypatch, sections
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert toy_run(whole, **sections).run() == "finished"
    learn = Learner.learn

    def killed(self, batch, *, step, progress):
        if step == 5:
            raise MemoryError
        return learn(self, batch, step=step, progress=progress)

    monkeypatch.setattr(Learner, "learn", killed)
    with pytest.raises(MemoryError):
        toy_run(parts, **sections).run()
    assert json.loads((parts / "runs/toy/status.json").read_text())["state"] == "failed"
    monkeypatch.setattr(Learner, "learn", learn)
    torch.manual_seed(99)  # another process's state
    assert toy_run(parts, "run.resume=latest", **sections).run() == "finished"
    assert rows(parts) == rows(whole)
    assert_same(final(parts), final(whole))


def test_the_training_must_fit_its_checkpoint(tmp_path):
    toy_run(tmp_path, "run.steps=2").run()
    with pytest.raises(ConfigError, match="already holds a run"):
        toy_run(tmp_path).run()
    with pytest.raises(ConfigError, match=r"run\.steps: 2 in the checkpoint, 6 now"):
        toy_run(tmp_path, "run.resume=latest").run()


def test_the_average_is_evaluated_and_exported(tmp_path):
    run = toy_run(tmp_path, "optim.ema_decay=0.9", "run.steps=3", tokenizer=FSQ)
    name = "quantizer.project.1.weight"
    parameter = run.weights.training.tokenizer.get_parameter(name)
    expected = parameter.detach().clone()
    learn = run.learner.learn

    def followed(batch, *, step, progress):
        found = learn(batch, step=step, progress=progress)
        decay = min(0.9, (1 + step) / (10 + step))  # 0.1, 2/11, 3/12
        expected.lerp_(parameter.detach(), 1 - decay)
        return found

    run.learner.learn = followed
    run.run()
    exported = final(tmp_path)
    torch.testing.assert_close(exported[name], expected, atol=1e-6, rtol=1e-6)
    assert (exported[name] - parameter.detach()).abs().max() > 1e-4
    state = read_weights(tmp_path / "runs/toy/checkpoints/step_000003")
    assert torch.equal(state["ema"][name], exported[name])
    assert torch.equal(state["training"][f"tokenizer.{name}"], parameter)
    tokenizer = load_pretrained(tmp_path / "runs/toy/final")
    images = to_float(run.task.held_out, torch.device("cpu"))
    with torch.no_grad():
        drawn = tokenizer.decode(tokenizer.encode(images))
    measured = rows(tmp_path)[-1]["eval/psnr"]
    assert measured == pytest.approx(float(psnr(drawn, images).mean()), abs=1e-3)
    card = (tmp_path / "runs/toy/final/README.md").read_text()
    assert f"| `eval/psnr` | {measured:.6g} |" in card and "3 of 3 steps" in card
    assert str(tmp_path) not in card


def test_the_psnr_of_an_error_of_a_tenth_is_20_db():
    images = torch.full((2, 3, 4, 4), 0.5)
    off = images + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert psnr(off, images).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)


def test_reconstructions_are_shown_for_growing_counts(tmp_path):
    run = toy_run(tmp_path, "run.steps=3", tokenizer=FLEXTOK, dropout={"mode": "pow2"})
    assert shown_counts(run.weights.training.tokenizer) == (1, 2, 4)
    run.run()
    last = rows(tmp_path)[-1]
    assert {f"eval/psnr/{count}" for count in (1, 2, 4)} <= last.keys()
    assert last["eval/psnr"] == last["eval/psnr/4"]
    assert last["eval/loss"] == pytest.approx(last["eval/loss/flow"])
    from PIL import Image

    with Image.open(tmp_path / "runs/toy/samples/reconstructions_000003.png") as grid:
        assert grid.size == (3 * 16 + 2 * 2, 4 * 16 + 3 * 2)  # 3 images; originals and 3 counts
        shown = torch.tensor(list(grid.crop((0, 0, 16, 16)).getdata())).T.reshape(3, 16, 16)
    assert torch.equal(shown.to(torch.uint8), run.task.held_out[0])


def test_evaluating_does_not_disturb_training(tmp_path):
    run = toy_run(tmp_path)
    training, state = run.weights.training.train(), torch.get_rng_state()
    before = {name: value.clone() for name, value in training.state_dict().items()}
    how = {"batch_size": 3, "num_shown": 2, "seed": 0, "progress": 0.5}
    evaluate_held_out(training, run.task.held_out, **how, device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state) and training.tokenizer.training
    assert_same(dict(training.state_dict()), before)
    for name, every in (("often", 1), ("never", 0)):
        (tmp_path / name).mkdir()
        toy_run(tmp_path / name, f"eval.every={every}").run()
    assert_same(final(tmp_path / "often"), final(tmp_path / "never"))


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    run = toy_run(tmp_path, addons=[{"name": "tests.tokenizer_cli.toys:Breaks"}])
    states = []
    learn = run.learner.learn

    def noted(batch, *, step, progress):
        states.append({n: p.detach().clone() for n, p in run.weights.training.named_parameters()})
        return learn(batch, step=step, progress=progress)

    run.learner.learn = noted
    with pytest.raises(NonFiniteError, match=r"step 4: these losses are not finite: loss/broken"):
        run.run()
    assert len(states) == 4
    assert_same(dict(run.weights.training.named_parameters()), states[-1])
    status = json.loads((tmp_path / "runs/toy/status.json").read_text())
    assert status["state"] == "failed" and "loss/broken" in status["reason"]


# --------------------------------------------------------------------------- adversaries


def one_step(folder: Path, **args):
    optim = {"lr": 1e-2, "adversary_lr": 0.5, "weight_decay": 0.0, "max_grad_norm": 1e9}
    run = toy_run(folder, addons=[{**CRITIC, "args": args}], tokenizer=FSQ, optim=optim)
    critic = run.weights.training.addons["Critic"]
    before = critic.adversary.weight.detach().clone()
    batch = [run.batches[0, number] for number in run.batches.cut.own]
    run.weights.training.train()
    found = run.learner.learn(batch, step=0, progress=0.0)
    return run, batch, critic, before, found


def test_an_adversary_moves_by_its_own_loss_alone(tmp_path):
    reference = toy_run(tmp_path, tokenizer=FSQ, addons=[CRITIC]).weights.training.train()
    _, batch, critic, before, found = one_step(tmp_path)
    images = torch.cat([to_float(part, torch.device("cpu")) for part in batch])
    drawn = reference(images, progress=0.0).reconstruction.detach()
    gradient = (drawn - images).flatten(1).mean(0)  # of mean(w . drawn) - mean(w . real)
    moved = (critic.adversary.weight.detach() - before)[0]
    clear = gradient.abs() > 1e-4
    # The first step of Adam is lr in the direction of the gradient, whatever its size.
    expected = -0.5 * gradient[clear].sign()
    torch.testing.assert_close(moved[clear], expected, atol=1e-3, rtol=1e-3)
    assert found["adversary/Critic"] != 0 and "loss/fooled" in found


def test_an_adversary_that_rests_stays_as_it_is_and_is_still_heard(tmp_path):
    run, _, critic, before, found = one_step(tmp_path, start=0.5)
    assert torch.equal(critic.adversary.weight, before)
    assert not [name for name in found if name.startswith("adversary")]
    alone, batch = toy_run(tmp_path, tokenizer=FSQ), run.batches
    alone.weights.training.train()
    alone.learner.learn([batch[0, n] for n in batch.cut.own], step=0, progress=0.0)
    ours, theirs = (r.weights.training.tokenizer.state_dict() for r in (run, alone))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


# --------------------------------------------------------------------------- autoencoders


def test_flextok_takes_a_trained_autoencoder_and_leaves_it_frozen(tmp_path):
    args = {**FLEXTOK["args"], "image_size": 64, "patch_size": 8, "autoencoder": "shapes"}
    run = toy_run(
        tmp_path, "run.steps=1", "eval.num_images=2", tokenizer={"name": "flextok", "args": args}
    )
    given = load_file(ROOT / "pipelines/weights/shapes_sd3/vae/diffusion_pytorch_model.safetensors")
    prefix = "stage0.vae."
    run.run()
    exported = final(tmp_path)
    ours = {k.removeprefix(prefix): v for k, v in exported.items() if k.startswith(prefix)}
    assert_same(ours, given)
    assert not any(name.startswith(prefix) for name in run.weights.ema)
    trained = {id(p) for p in run.learner.main.parameters}
    assert not trained & {id(p) for p in run.weights.training.tokenizer.stage0.parameters()}
    config = json.loads((tmp_path / "runs/toy/final/config.json").read_text())
    assert config["args"]["autoencoder"]["scaling_factor"] == pytest.approx(0.78725195)
    assert str(ROOT) not in json.dumps(config)


def test_training_goes_on_from_a_saved_tokenizer(tmp_path):
    toy_run(tmp_path, "run.steps=2").run()
    start = tmp_path / "runs/toy/final"
    run = toy_run(tmp_path, "run.name=more", tokenizer={"start_from": str(start)})
    assert_same(dict(run.weights.training.tokenizer.state_dict()), final(tmp_path))


# --------------------------------------------------------------------------- processes


def launch(folder: Path, processes: int, **sections) -> None:
    folder.mkdir()
    command = ["flowrl", "tokenizer", "train", str(write_config(folder, **sections))]
    if processes > 1:
        spread = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        command = [*spread, *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_compute_the_gradients_of_one(tmp_path):
    sections = {
        "tokenizer": FSQ,
        "addons": [{**CRITIC, "args": {"start": 0.4}}],  # rests for two steps of four
        "run": {"steps": 4},
        "optim": {"lr": 1e-3},
        "compute": {"batch_size": 8, "micro_batch_size": 2},  # so that gradients add up first
    }
    for name, processes in (("one", 1), ("two", 2)):
        launch(tmp_path / name, processes, **sections)
    alone, shared = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row.keys() for row in alone] == [row.keys() for row in shared]
    assert "train/adversary/Critic" in alone[-2] and "train/adversary/Critic" not in alone[0]
    for a, b in zip(alone, shared, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)
    assert alone[0]["train/grad_norm"] == pytest.approx(shared[0]["train/grad_norm"], rel=1e-5)
