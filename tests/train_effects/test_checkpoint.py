"""A save is complete or did not happen, and a resumed run is the run that was never stopped."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import random
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from flowrl.errors import CheckpointError, ConfigError
from flowrl.train import checkpoint, statefiles
from flowrl.train.checkpoint import Checkpoints
from flowrl.train.resume import check_same_run


class NetworkWeights:
    """The current parameters and their moving average, as `flowrl.protocols.Weights` has them."""

    def __init__(self, network):
        self.network = network
        self.ema = [p.detach().clone() for p in network.parameters()]

    def update_ema(self):
        for mean, p in zip(self.ema, self.network.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.1)

    def state_dict(self):
        return {"current": self.network.state_dict(), "ema": self.ema, "num_updates": 3}

    def load_state_dict(self, state):
        self.network.load_state_dict(state["current"])
        for mean, saved in zip(self.ema, state["ema"], strict=True):
            mean.copy_(saved)


class Loop:
    """Training whose every step depends on all the random states, Adam's moments and the lr."""

    def __init__(self, seed=0):
        for reset in (AcceleratorState, PartialState):
            reset._reset_state()
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.weights = NetworkWeights(network)
        self.network, self.optimizer, self.scheduler = self.accelerator.prepare(
            network, optimizer, scheduler
        )

    def step(self):
        scale = random.random() + np.random.rand()
        loss = self.network(torch.randn(16, 4)).square().mean() * scale
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.weights.update_ema()

    def everything(self):
        return {
            "weights": copy.deepcopy(self.weights.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "lr": self.scheduler.get_last_lr(),
            "random": (torch.rand(3), random.random(), float(np.random.rand())),
        }


def assert_equal(one, two, at="state"):
    assert type(one) is type(two), at
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), at
    elif isinstance(one, dict):
        assert list(one) == list(two), at
        for key in one:
            assert_equal(one[key], two[key], f"{at}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), at
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{at}.{index}")
    else:
        assert one == two, at


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A loop, its checkpoints, and one of them, at step 2."""
    loop, store = Loop(), Checkpoints(tmp_path / "checkpoints", keep=2)
    loop.step()
    loop.step()
    path = store.save(loop.accelerator, 2, {"step": 2, "best": 0.5}, loop.weights)
    return loop, store, path


def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(saved):
    loop, store, path = saved
    for _ in range(3):
        loop.step()
    expected = loop.everything()

    other = Loop(seed=7)
    assert store.find("latest") == path
    assert store.load(other.accelerator, path, other.weights) == {"step": 2, "best": 0.5}
    for _ in range(3):
        other.step()
    assert_equal(expected, other.everything())


def test_saving_does_not_disturb_training(tmp_path):
    plain, saving = Loop(), None
    for _ in range(3):
        plain.step()
    expected = plain.everything()
    saving = Loop()
    store = Checkpoints(tmp_path, keep=1)
    for step in range(3):
        saving.step()
        store.save(saving.accelerator, step, {}, saving.weights)
    assert_equal(expected, saving.everything())


def test_only_the_weights_state_is_stored_of_the_network(saved):
    _, _, path = saved
    assert names(path) == [
        "extra.json", "manifest.json", "optimizer.bin", "random_states_0.pkl", "scheduler.bin",
        "weights.json", "weights.safetensors",
    ]  # fmt: skip
    assert saved[0].accelerator._save_model_state_pre_hook == {}


def test_weights_come_back_with_their_nesting_and_types(tmp_path):
    base = torch.arange(6.0)
    state = {
        "a/b": base[:3],
        "shared": base,
        "half": torch.ones(2, dtype=torch.bfloat16).requires_grad_(),
        "turned": torch.arange(6).reshape(2, 3).T,
        "empty": torch.zeros(0, 4),
        "list": [torch.zeros(()), None, True, 2.5, "text", {}],
    }
    statefiles.write_weights(state, tmp_path)
    back = statefiles.read_weights(tmp_path)
    expected = {**state, "half": state["half"].detach()}
    assert_equal(expected, back)
    with pytest.raises(TypeError, match="weights/list/0 is a set"):
        statefiles.write_weights({"list": [{1}]}, tmp_path)
    with pytest.raises(TypeError, match="has the key 1"):
        statefiles.write_weights({1: base}, tmp_path)


STAGES = {
    "accelerate's files": (Accelerator, "save_state"),
    "weights": (statefiles, "save_file"),
    "manifest": (statefiles, "fingerprint"),
    "sync": (os, "fsync"),
    "rename": (os, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("a bug")],
    ids=["disk full", "ctrl-c", "bug"],
)
def test_a_save_that_fails_leaves_the_previous_checkpoint(saved, monkeypatch, stage, error):
    loop, store, _path = saved
    expected = loop.everything()
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], _raiser(error))
        expected_error = CheckpointError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected_error) as caught:
            store.save(loop.accelerator, 3, {"step": 3}, loop.weights)
    if isinstance(error, OSError):
        assert "the disk is full" in str(caught.value)
        assert "run.resume=latest" in str(caught.value)
    assert names(store.folder) == ["step_000002"]
    other = Loop(seed=7)
    store.load(other.accelerator, store.find("latest"), other.weights)
    assert_equal(expected, other.everything())
    assert store.save(loop.accelerator, 3, {"step": 3}, loop.weights).name == "step_000003"


def _raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("stage", [*STAGES, "deletion of the old one"])
def test_a_process_killed_in_a_save_leaves_a_checkpoint_and_the_next_save_cleans_up(
    saved, monkeypatch, stage
):
    # A kill runs no `except`: what it leaves is what is on the disk when the stage begins.
    loop, store, _path = saved
    store.keep = 1
    target, name = STAGES.get(stage, (checkpoint.shutil, "rmtree"))
    killed = os.fork()
    if killed == 0:
        monkeypatch.setattr(target, name, lambda *args, **kwargs: os._exit(9))
        store.save(loop.accelerator, 3, {"step": 3}, loop.weights)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == 9
    assert any(name.startswith(".step_") for name in names(store.folder))
    is_in_place = stage == "deletion of the old one"
    assert store.find("latest").name == ("step_000003" if is_in_place else "step_000002")
    other = Loop(seed=7)
    extra = store.load(other.accelerator, store.find("latest"), other.weights)
    assert extra["step"] == (3 if is_in_place else 2)
    store.save(loop.accelerator, 4, {"step": 4}, loop.weights)
    assert names(store.folder) == ["step_000004"]


def test_a_full_disk_of_a_real_file_system_is_reported_as_such(saved, tmp_path):
    loop, store, _ = saved
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        store = Checkpoints(disk, keep=2)
        store.save(loop.accelerator, 2, {}, loop.weights)
        # Sizes at which torch.save, safetensors and plain writes meet the end of the disk.
        for size in (5_000, 20_000, 60_000, 250_000):
            filler = disk / "filler"
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(max(0, free - size)))
            try:
                store.save(loop.accelerator, 3, {"pad": "x" * size}, loop.weights)
            except CheckpointError as error:
                assert "the disk is full" in str(error)
            else:
                raise AssertionError(f"a save fit into {size} bytes")
            filler.unlink()
            assert names(disk) == ["step_000002"]
            statefiles.verify(disk / "step_000002")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_rotation_keeps_the_newest_and_deletes_only_when_the_new_one_is_there(saved, monkeypatch):
    loop, store, _ = saved
    seen = []
    rename = os.rename

    def watch(source, target):
        rename(source, target)
        seen.append(names(store.folder))

    monkeypatch.setattr(os, "rename", watch)
    for step in (4, 6):
        store.save(loop.accelerator, step, {}, loop.weights)
    assert names(store.folder) == ["step_000004", "step_000006"]
    assert seen[1] == ["step_000002", "step_000004", "step_000006"]


def test_checkpoints_of_an_abandoned_continuation_do_not_outlive_newer_ones(saved):
    loop, store, first = saved
    store.save(loop.accelerator, 8, {}, loop.weights)
    store.load(loop.accelerator, first, loop.weights)
    store.save(loop.accelerator, 4, {}, loop.weights)
    assert names(store.folder) == ["step_000004", "step_000008"]
    assert store.find("latest").name == "step_000004"
    store.save(loop.accelerator, 6, {}, loop.weights)
    assert names(store.folder) == ["step_000004", "step_000006"]


def test_saving_a_step_again_replaces_it(saved):
    loop, store, first = saved
    loop.step()
    second = store.save(loop.accelerator, 2, {"second": True}, loop.weights)
    assert second != first and not first.exists()
    assert store.find("latest") == second
    third = store.save(loop.accelerator, 2, {"third": True}, loop.weights)
    assert names(store.folder) == [third.name]
    assert statefiles.read_extra(third) == {"third": True}


@pytest.mark.parametrize("name", ["optimizer.bin", "weights.safetensors", "random_states_0.pkl"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damage_is_found_before_anything_is_loaded(saved, name, damage):
    loop, store, previous = saved
    newest = store.save(loop.accelerator, 4, {}, loop.weights)
    file = newest / name
    data = bytearray(file.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    assert store.find("latest") == newest  # never silently the one before
    other = Loop(seed=7)
    before = copy.deepcopy(other.weights.state_dict())
    with pytest.raises(CheckpointError) as caught:
        store.load(other.accelerator, newest, other.weights)
    assert str(file) in str(caught.value)
    assert f"run.resume={previous}" in str(caught.value)
    assert_equal(before, other.weights.state_dict())


def test_a_checkpoint_without_its_manifest_is_named_not_skipped(saved):
    loop, store, _ = saved
    newest = store.save(loop.accelerator, 4, {}, loop.weights)
    (newest / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_000004/manifest\.json cannot be read"):
        store.find("latest")
    manifest = json.loads((newest.parent / "step_000002" / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this flowrl reads 1"):
        store.find("latest")


def test_unfinished_folders_are_not_checkpoints(saved):
    loop, store, path = saved
    unfinished = store.folder / ".step_000009.tmp"
    unfinished.mkdir()
    (unfinished / "manifest.json").write_text("{}")
    assert store.find("latest") == path
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        store.find(str(unfinished))
    store.save(loop.accelerator, 4, {}, loop.weights)
    assert not unfinished.exists()


def test_find_says_what_there_is(saved, tmp_path):
    _, store, path = saved
    assert store.find(None) is None
    assert store.find(str(path)) == path
    with pytest.raises(CheckpointError, match=r"did you mean '.*step_000002'"):
        store.find(str(store.folder / "step_000003"))
    empty = Checkpoints(tmp_path / "none", keep=1)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint; drop run\.resume"):
        empty.find("latest")
    with pytest.raises(CheckpointError, match=r"there is none yet; drop run\.resume"):
        empty.find("step_000001")
    with pytest.raises(ConfigError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_a_state_of_another_network_is_refused_with_a_remedy(saved):
    _, store, path = saved
    other = Loop()
    other.weights = NetworkWeights(nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match="does not fit this run"):
        store.load(other.accelerator, path, other.weights)


def test_a_random_state_that_accelerate_could_not_restore_stops_the_run(saved, monkeypatch):
    # accelerate logs "Could not load random states" and goes on, another run than it says.
    _, store, path = saved
    other = Loop(seed=7)
    monkeypatch.setattr(np.random, "set_state", _raiser(ValueError("another numpy")))
    monkeypatch.setattr(torch, "set_rng_state", _raiser(ValueError("another torch")))
    with pytest.raises(CheckpointError, match=r"random_states_0\.pkl was not restored"):
        store.load(other.accelerator, path, other.weights)


CONFIG = {
    "run": {"name": "a", "seed": 0, "steps": 10, "resume": None},
    "optim": {"lr": 1e-4, "schedule": "constant"},
    "rewards": [{"name": "x", "weight": 1.0}],
    "compute": {"micro_batch_size": 8, "mixed_precision": "no"},
    "model": {"gradient_checkpointing": False},
    "eval": {"every": 10},
    "scoring": {"max_invalid": 0.05, "window": 20, "timeout_s": None, "min_group_share": 0.5},
}


def changed(key, value, base=CONFIG):
    config = copy.deepcopy(base)
    *parents, last = key.split(".")
    node = config
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.steps", 20), ("run.name", "b"), ("run.resume", "latest"),
        ("compute.micro_batch_size", 4), ("eval.every", 0), ("eval.seed", 3),
        ("model.gradient_checkpointing", True), ("monitor", {"reward": "x"}),
        ("scoring.max_invalid", 0.2), ("scoring.window", 5), ("scoring.timeout_s", 9.0),
    ],
)  # fmt: skip
def test_what_does_not_change_the_result_may_differ(key, value):
    check_same_run(CONFIG, changed(key, value))


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("run.seed", 1, "run.seed: 0 in the checkpoint, 1 now"),
        ("optim.lr", 3e-4, "optim.lr: 0.0001 in the checkpoint, 0.0003 now"),
        ("rewards.0.weight", 2.0, "rewards.0.weight: 1.0 in the checkpoint, 2.0 now"),
        ("compute.mixed_precision", "bf16", "compute.mixed_precision"),
        ("optim.new", 1, "optim.new: not set in the checkpoint, 1 now"),
        ("rewards", [], "rewards"),
        ("scoring.min_group_share", 0.0, "scoring.min_group_share: 0.5 in the checkpoint, 0.0 now"),
    ],
)
def test_what_changes_the_result_is_refused_and_listed(key, value, line):
    with pytest.raises(ConfigError) as caught:
        check_same_run(CONFIG, changed(key, value))
    assert line in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        check_same_run(changed("model.id", "other"), changed(key, value))
    assert line in str(caught.value) and "model.id" in str(caught.value)


def test_more_steps_are_refused_where_the_learning_rate_depends_on_them():
    cosine = changed("optim.schedule", "cosine")
    check_same_run(cosine, changed("run.name", "b", cosine))
    with pytest.raises(ConfigError, match=r"run\.steps: 10 in the checkpoint, 20 now"):
        check_same_run(cosine, changed("run.steps", 20, cosine))


def _two_ranks(rank, port, folder):
    """One of two processes; an assertion that fails here is its exit code."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    loop = Loop()
    accelerator, weights = loop.accelerator, loop.weights
    assert accelerator.num_processes == 2 and accelerator.process_index == rank
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(100 + rank)
    store = Checkpoints(folder, keep=1)
    loop.step()
    path = store.save(accelerator, 1, {"step": 1}, weights)
    assert path.name == "step_000001"
    loop.step()
    expected = loop.everything()
    assert store.load(accelerator, path, weights) == {"step": 1}
    loop.step()
    assert_equal(expected, loop.everything())

    save_state = accelerator.save_state

    def full_on_rank_1(to):
        save_state(to)
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    accelerator.save_state = full_on_rank_1
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        store.save(accelerator, 2, {}, weights)
    assert ("process 1: " in str(caught.value)) == (rank == 0)
    accelerator.wait_for_everyone()
    assert names(folder) == ["step_000001"]

    accelerator.wait_for_everyone()
    if rank == 0:
        (path / "optimizer.bin").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.bin is missing"):
        store.load(accelerator, path, weights)
    accelerator.end_training()


def test_two_processes_save_load_and_fail_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for long
    ranks = [fork.Process(target=_two_ranks, args=(r, port, tmp_path / "c")) for r in (0, 1)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [0, 0]
