"""The commands a person types: what they write, and how they refuse what cannot be done.

Kills, among others: a sampler of its own (a run's evaluation must come out equal to the trainer's);
options that are not passed on; an error that names neither file nor key; a traceback.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from flowrl.__main__ import app
from flowrl.commands.models import find_model
from flowrl.commands.sample import file_name
from tests.artefacts.flux_folder import tiny_transformer, write_flux
from tests.artefacts.tiny_run import save_base, train, write_config

PLAIN = ["--num-steps", "2", "--guidance-scale", "1", "--max-sequence-length", "12"]
PROMPT = "a photo of a red square"


def flowrl(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object) -> str:
    """The one message of a command that exits with 2."""
    result = flowrl(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.endswith("\n")
    assert "Traceback" not in result.output
    assert "Cost" not in result.stdout
    return result.stderr


def done(*arguments: object) -> str:
    result = flowrl(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base model, `base`, and the finished runs `lora` and `full`."""
    folder = tmp_path_factory.mktemp("commands")
    train(
        write_config(folder, "lora"), "run.name=lora", "model.lora.rank=4", "model.lora.alpha=8",
        "eval.guidance_scale=2.0",
    )  # fmt: skip
    train(write_config(folder, "full"), "run.name=full", "run.steps=1", "optim.lr=0.003")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


# --------------------------------------------------------------------------- sample


def test_sample_writes_an_image_each_and_a_grid(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    printed = done("sample", base, PROMPT, "--num", 3, "--seed", 5, "--out", out, *PLAIN)
    names = [f"a_photo_of_a_red_square_seed5_{part}.png" for part in ("00", "01", "02", "grid")]
    assert sorted(path.name for path in out.iterdir()) == names
    assert printed.splitlines()[1:] == [str(out / name) for name in names]
    sizes = [Image.open(out / name).size for name in names]
    assert sizes[:3] == [(64, 64)] * 3 and sizes[3][0] > 128


def test_an_image_depends_on_prompt_and_seed_and_not_on_its_neighbours(
    base: Path, tmp_path: Path
) -> None:
    def first(name: str, prompt: str, *options: object) -> np.ndarray:
        done("sample", base, prompt, "--out", tmp_path / name, *PLAIN, *options)
        return np.asarray(Image.open(next((tmp_path / name).glob("*_00.png"))), int)

    alone = first("alone", PROMPT, "--num", 1)
    assert not list((tmp_path / "alone").glob("*grid*"))
    # A batch of another size may round another way: one level of 256, in few pixels.
    difference = np.abs(first("among", PROMPT, "--num", 2) - alone)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    for name, prompt, *options in (
        ("seed", PROMPT, "--seed", 1),
        ("prompt", "two blue circles"),
        ("guided", PROMPT, "--guidance-scale", 4),
        ("steps", PROMPT, "--num-steps", 3),
    ):
        other = first(name, prompt, "--num", 1, *options)
        assert (np.abs(other - alone) > 1).mean() > 0.01, name


def test_sample_draws_the_size_that_it_is_asked_for(base: Path, tmp_path: Path) -> None:
    size = ["--height", 32, "--width", 48]
    done("sample", base, PROMPT, "--num", 1, "--out", tmp_path, *PLAIN, *size)
    assert Image.open(next(tmp_path.glob("*.png"))).size == (48, 32)


def test_a_run_draws_what_its_lora_on_the_base_draws(folder: Path, tmp_path: Path) -> None:
    run, base = folder / "runs/lora", folder / "base"
    as_run = ["--num-steps", 4, "--guidance-scale", 2, "--max-sequence-length", 12, "--num", 1]
    done("sample", run, PROMPT, "--num", 1, "--out", tmp_path / "run")
    for name, lora in (("folder", run / "final"), ("file", next(run.glob("final/*.safetensors")))):
        done("sample", base, PROMPT, "--lora", lora, "--out", tmp_path / name, *as_run)
    done("sample", base, PROMPT, "--out", tmp_path / "base", *as_run)
    run_image, folder_image, file_image, base_image = (
        next((tmp_path / name).iterdir()).read_bytes() for name in ("run", "folder", "file", "base")
    )
    assert run_image == folder_image == file_image != base_image


def test_the_best_of_a_run_is_a_model_too(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "runs/lora", run)
    message = refused("sample", run / "best", PROMPT)
    assert f"{run} has no best/pytorch_lora_weights.safetensors" in message
    assert "monitor.reward" in message
    (run / "final").rename(run / "best")
    (run / "best/best.json").write_text('{"reward": "shapes_gold", "step": 1}')
    model = find_model(str(run / "best"), {}, command="flowrl eval")
    assert (model.lora, model.step) == (run / "best/pytorch_lora_weights.safetensors", 1)
    assert "has no final/" in refused("sample", run, PROMPT)


def test_a_flux_folder_is_sampled_without_being_told_so(tmp_path: Path) -> None:
    flux = write_flux(tmp_path / "flux", tiny_transformer())
    model = find_model(str(flux), {}, command="flowrl sample")
    assert (model.pipeline, model.guidance_scale, model.max_sequence_length) == ("flux", 3.5, 512)
    size = ["--height", 32, "--width", 32, "--num-steps", 2, "--max-sequence-length", 12]
    done("sample", flux, PROMPT, "--num", 1, "--out", tmp_path / "out", *size)
    assert Image.open(next((tmp_path / "out").glob("*.png"))).size == (32, 32)


def test_the_embedded_model_is_sampled_as_it_was_trained() -> None:
    model = find_model("shapes", {"num_steps": None, "guidance_scale": 2.0}, command="flowrl eval")
    assert (model.height, model.width, model.max_sequence_length) == (64, 64, 12)
    assert (model.num_steps, model.guidance_scale) == (20, 2.0)


def test_the_name_of_a_file_is_short_and_plain() -> None:
    assert file_name("A red square, left of: two/three") == "a_red_square_left_of_two_three"
    assert file_name("?!") == "image"
    long = file_name("word " * 40)
    assert len(long) <= 60 and long.endswith("word")


# --------------------------------------------------------------------------- eval


@pytest.mark.parametrize(("name", "step"), [("lora", 2), ("full", 1)])
def test_eval_of_a_run_is_the_trainers_last_evaluation(
    folder: Path, tmp_path: Path, name: str, step: int
) -> None:
    run, file = folder / "runs" / name, f"step_{step:06d}.json"
    printed = done("eval", run, "--out", tmp_path)
    theirs = json.loads((run / "eval" / file).read_text())
    ours = json.loads((tmp_path / file).read_text())
    # Equal weights, noise and batches; a LoRA without its alpha is 2e-3 off.
    for key in ("score", "diversity"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-7)
    for key in ("skills", "rewards"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-7)
    for key in ("num_samples", "num_steps", "guidance_scale", "seed"):
        assert ours[key] == theirs[key]
    assert theirs["score"] != json.loads((run / "eval/step_000000.json").read_text())["score"]
    assert f"{theirs['score']:.3f}" in printed and "skill counting" in printed
    assert len(list((tmp_path / file).with_suffix("").glob("*.png"))) == ours["num_samples"] == 6


def test_eval_measures_what_it_is_asked_for(base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a red square\ntwo blue circles\na green star\n")
    asked = ["--data", prompts, "--reward", "brightness", "--samples-per-prompt", 2]
    more = ["--max-prompts", 2, "--seed", 9]
    out = tmp_path / "out"
    printed = done("eval", base, *asked, *more, "--out", out, *PLAIN)
    scores = json.loads((out / "step_000000.json").read_text())
    assert list(scores["rewards"]) == ["brightness"] and scores["skills"] == {}
    assert scores["num_samples"] == 4 and scores["seed"] == 9 and scores["num_steps"] == 2
    assert "brightness" in printed and "diversity" in printed
    assert json.loads((out / "model.json").read_text())["id"] == str(base)


def test_eval_without_a_folder_writes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = done("eval", base, "--max-prompts", 6, *PLAIN)
    assert all(f"skill {tag}" in printed for tag in ("colors", "position", "two_object"))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- refusals of MODEL


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    message = refused("sample", "shape", PROMPT, "--out", tmp_path)
    assert "shape is neither a folder, a Hub id" in message and "did you mean 'shapes'?" in message
    message = refused("eval", tmp_path / "nothing")
    assert f"there is no model folder {tmp_path / 'nothing'}" in message


@pytest.mark.parametrize("command", [["sample", PROMPT], ["eval"]])
def test_a_model_without_a_component_is_refused(
    base: Path, tmp_path: Path, command: list[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in base.iterdir():
        if part.name != "vae":
            (broken / part.name).symlink_to(part)
    message = refused(command[0], broken, *command[1:], "--out", tmp_path / "out")
    assert f"the model folder {broken} lacks vae" in message


def test_what_a_model_cannot_draw_is_refused(base: Path, tmp_path: Path) -> None:
    message = refused("sample", base, PROMPT, "--height", 65, "--out", tmp_path)
    assert "height=65 does not fit the model: use a multiple of 8, at most 64" in message


def test_a_run_without_an_artefact_is_refused(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((folder / "runs/full/config.yaml").read_text())
    (run / "status.json").write_text('{"state": "stopped", "step": 7}')
    message = refused("eval", run)
    assert f"{run} has no final/pipeline (the run is stopped at step 7)" in message
    assert "run.resume=latest" in message


def test_wrong_loras_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    run, base = folder / "runs/lora", folder / "base"
    out = ["--out", tmp_path / "out"]
    assert "there is no LoRA" in refused("sample", base, PROMPT, "--lora", tmp_path, *out)
    message = refused("sample", run, PROMPT, "--lora", run / "final", *out)
    assert "is a LoRA already" in message and str(base) in message
    key = "transformer_blocks.0.attn.to_q.lora_{}.weight"
    for prefix, size, words in (
        ("text_encoder.", 128, "not a LoRA of the transformer alone"),
        ("transformer.", 100, "does not fit the model"),
    ):
        file = tmp_path / f"{size}.safetensors"
        shapes = {"A": (4, size), "B": (size, 4)}
        save_file({prefix + key.format(k): torch.zeros(s) for k, s in shapes.items()}, file)
        assert words in refused("sample", base, PROMPT, "--lora", file, *out)
    file.write_bytes(b"no tensors")
    assert "not a safetensors file" in refused("sample", base, PROMPT, "--lora", file, *out)


def test_a_folder_that_cannot_be_made_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("sample", base, PROMPT, "--out", tmp_path / "file" / "x", *PLAIN)
    assert f"--out {tmp_path / 'file' / 'x'} cannot be made" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reward", "brightnes"], ["--reward: brightnes", "did you mean 'brightness'?"]),
        (["--data", "shapes/held"], ["--data=shapes/held", "did you mean 'shapes/heldout'?"]),
        (["--data", "none.jsonl"], ["--data: none.jsonl: no such file"]),
    ],
)
def test_eval_refuses_what_it_does_not_know_before_the_model_is_loaded(
    options: list[str], words: list[str], tmp_path: Path
) -> None:
    message = refused("eval", tmp_path / "nothing", *options)
    assert all(each in message for each in words)


# --------------------------------------------------------------------------- check


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    (tmp_path / "base").symlink_to(base)
    return write_config(tmp_path, "full")


def test_check_says_what_would_run_and_writes_nothing(config: Path) -> None:
    before = set(config.parent.iterdir())
    printed = done("check", config)
    assert all(
        word in printed for word in ("mix_grpo", "2 groups x 4 = 8", "brightness", "network")
    )
    assert "everything fits together" in printed
    assert set(config.parent.iterdir()) == before


def test_check_says_what_is_trained_on_what_is_watched_and_which_one_guards(config: Path) -> None:
    rewards = "rewards=[{name: jpeg_compressibility}, {name: shapes_strict, weight: 0}]"
    printed = done(
        "check", config, rewards, "eval.rewards=[{name: brightness}]", "eval.every=1",
        "monitor={reward: brightness, early_stop: 3}",
    )  # fmt: skip
    text = " ".join(re.sub(r"[^\x20-\x7e]", " ", printed).split())
    assert "jpeg_compressibility trained on, weight 1, on rollouts and held-out prompts" in text
    assert "shapes_strict monitor, on rollouts and held-out prompts; images" in text
    assert "brightness monitor, on held-out prompts, guards the run: its best weights" in text
    assert "3 evaluations without a new best end the run" in text
    # 3 prompts, 10 samples each, at 4 levels; before that 4 steps to each, and the base's too
    assert "120 network evaluations per held-out evaluation, 360 in the first one" in text
    plain = done("check", config)
    assert "guards the run" not in plain and "distance from base" not in plain


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rewards.0.name=brightnes", ["rewards: brightnes", "did you mean 'brightness'?"]),
        ("eval.rewards=[{name: nope}]", ["eval.rewards: nope", "known: "]),
        ("model.pipeline=sd4", ["model.pipeline=sd4 is not a pipeline", "did you mean 'sd3'?"]),
        ("model.args={shfit: 3}", ["model.args.shfit", "did you mean 'shift'?"]),
        ("model.args={device: cpu}", ["model.args.device is set by flowrl itself"]),
        ("model.height=60", ["height=60 does not fit the model: use a multiple of 8"]),
        ("model.id=nothing", ["model.id=nothing cannot be loaded", "neither a folder, a Hub id"]),
        ("method.name=mixgrpo", ["method.name=mixgrpo", "did you mean 'mix_grpo'?"]),
        ("method.args={windw: 2}", ["method.args.windw is not an argument of mix_grpo",
                                    "did you mean 'window'?"]),
        ("method.args={window: many}", ["method.args.window must be", "many"]),
        ("method.args={window: 30}", ["method.args: ", "window"]),
        ("data.num_groups=3 & optim.updates_per_rollout=2", ["data.num_groups=3",
                                                           "use 2 or 4 groups"]),
        ("data.train=shapes/trian", ["data.train=shapes/trian", "did you mean 'shapes/train'?"]),
        ("data.train=prompts.jsonl", ["data.train: prompts.jsonl: no such file"]),
        ("data.train=prompts.csv", ["must be a .jsonl file"]),
        ("monitor.reward=brightnes", ["monitor.reward=brightnes is not measured",
                                      "did you mean 'brightness'?", "add it to eval.rewards"]),
        ("monitor={reward: brightness, proxy: nope}", ["monitor.proxy=nope is not measured"]),
        ("monitor.reward=brightness & eval.rewards=[{name: brightness}] & "
         "rewards=[{name: win_rate, args: {judge: brightness}}]",
         ["win_rate compares the samples of a group", "name it in monitor.proxy"]),
        ("monitor.reward=win_rate & rewards=[{name: win_rate, args: {judge: brightness}}]",
         ["monitor.reward=win_rate is not measured", "add it to eval.rewards"]),
        ("method.name=grpo & method.args={}", ["grpo trains token models",
                                               "sd3 is a flow model"]),
    ],
)  # fmt: skip
def test_check_refuses_with_one_message(config: Path, override: str, words: list[str]) -> None:
    message = refused("check", config, *override.split(" & "))
    assert all(each in message for each in words), message
    assert config.name in message or "override" in message
    assert message.count("\n") == 1


def test_check_names_the_component_that_a_model_lacks(config: Path, base: Path) -> None:
    broken = config.parent / "broken"
    broken.mkdir()
    for part in base.iterdir():
        if part.name not in ("text_encoder_2", "transformer"):
            (broken / part.name).symlink_to(part)
    message = refused("check", config, f"model.id={broken}")
    assert f"the model folder {broken} lacks transformer, text_encoder_2" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a red square"', "line 2: not JSON"),
        ('["a red square"]', "line 2: expected an object"),
        ('{"promt": "a red square"}', "line 2: there is no \"prompt\"; did you mean 'promt'?"),
        ('{"prompt": ""}', 'line 2: "prompt" must be a text that is not empty'),
    ],
)
def test_check_names_the_line_that_is_wrong(config: Path, line: str, words: str) -> None:
    prompts = config.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red square"}\n' + line + "\n")
    message = refused("check", config, f"data.train={prompts}")
    assert str(prompts) in message and words in message
    assert message.count("\n") == 1


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("")
    message = refused("check", tmp_path / "quik.yaml")
    assert "quik.yaml" in message and "quick.yaml" in message
