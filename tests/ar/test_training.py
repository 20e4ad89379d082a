"""`flowrl ar train`: it learns, resumes bit by bit, says what does not fit, and what it leaves is
a model that `flowrl train` aligns.

Kills, among others: prompts that are never dropped, or anew after a resume; held-out pairs that are
trained on; an export of other weights than those that were evaluated.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from flowrl.__main__ import app
from flowrl.ar import configdoc
from flowrl.ar.build import build_run
from flowrl.ar.schema import load_ar_config
from flowrl.errors import ConfigError, DataError
from pipelines.ar.registry import load_model
from tests.ar.toys import CONFIG, write_config

ROOT = Path(__file__).resolve().parents[2]
runner = CliRunner()


def toy_run(folder, *overrides, **sections):
    config = load_ar_config(write_config(folder, **sections), overrides)
    return build_run(config, where="toy.yaml")


def rows_of(run):
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_it_learns_and_leaves_a_model(tmp_path):
    run = toy_run(tmp_path, "run.steps=30", "eval.every=0")
    assert run.run() == "finished"
    rows = rows_of(run)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[0] > 6 and max(losses[-5:]) < losses[0] - 0.6  # from about log 512
    found = next(row for row in rows if "eval/loss" in row)
    assert found["eval/bits_per_token"] == pytest.approx(found["eval/loss"] / 0.693147, rel=1e-4)
    assert (run.folder / "final/README.md").read_text().startswith("# toy\n")
    model = load_model(run.folder / "final")
    with run.weights.averaged(), torch.no_grad():
        for name, value in run.task.model.generator.state_dict().items():
            assert torch.equal(model.generator.state_dict()[name], value)
    assert list((run.folder / "samples").glob("drawn_*.png"))


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = toy_run(tmp_path / "a")
    whole.run()
    part = toy_run(tmp_path / "b")
    learn, calls = part.learner.learn, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("killed")
        return learn(*args, **kwargs)

    part.learner.learn = killed
    with pytest.raises(RuntimeError, match="killed"):
        part.run()
    again = toy_run(tmp_path / "b", "run.resume=latest")
    again.run()
    files = [run.folder / "final/model.safetensors" for run in (whole, again)]
    first, second = (load_file(file) for file in files)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_prompts_are_dropped_at_their_rate_and_the_same_each_time(tmp_path):
    run = toy_run(tmp_path, data={**CONFIG["data"], "prompt_dropout": 0.5})
    empty = run.batches.empty
    batches = [run.batches[step, number]["text"] for step in range(30) for number in range(2)]
    share = torch.cat([(text == empty).all(1) for text in batches]).float().mean()
    assert 0.35 < float(share) < 0.65
    assert torch.equal(run.batches[3, 1]["text"], run.batches[3, 1]["text"])
    none = toy_run(tmp_path / "b", data={**CONFIG["data"], "prompt_dropout": 0.0})
    assert not (none.batches[0, 0]["text"] == empty).all(1).any()


def test_a_file_of_captioned_images_is_split_and_read(tmp_path):
    for number in range(6):
        Image.new("RGB", (80, 64), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"prompt": f"a photo of a red circle {n}", "image": f"{n}.png"} for n in range(6)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    data = {"source": str(file), "held_out": 2}
    run = toy_run(tmp_path, "eval.num_images=2", data=data)
    trained, held_out = run.batches.pairs.prompts, run.task.held_out.prompts
    assert len(trained) == 4 and len(held_out) == 2 and not {*trained} & {*held_out}
    with pytest.raises(ConfigError, match=r"holds 6 images, and data\.held_out=6"):
        toy_run(tmp_path, "eval.num_images=2", data={**data, "held_out": 6})
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="line 1: expected"):
        toy_run(tmp_path, "eval.num_images=1", data={**data, "held_out": 1})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.generator=rastr"], "did you mean 'raster'"),
        (["model.tokenizer=shapes_vg"], "model.tokenizer=shapes_vg"),
        (["model.args.num_words=3"], "follows from model.texts"),
        (["model.tokenizer=shapes_binary"], "one id per token"),
        (["data.source=nowhere.jsonl"], "data.source=nowhere.jsonl: there is no such file"),
        (["model.texts=/nowhere"], "model.texts=/nowhere"),
    ],
)
def test_parts_that_do_not_exist_or_fit_are_named(tmp_path, overrides, words):
    with pytest.raises(ConfigError) as caught:
        toy_run(tmp_path, *overrides)
    assert str(caught.value).startswith("toy.yaml: ") and words in str(caught.value)


def test_a_mistyped_key_is_refused_and_so_are_two_sources_of_a_model(tmp_path):
    with pytest.raises(ConfigError, match=r"optim\.lrr"):
        load_ar_config(write_config(tmp_path), ["optim.lrr=1"])
    with pytest.raises(ConfigError, match=r"give either model\.generator or model\.start_from"):
        load_ar_config(write_config(tmp_path), ["model.start_from=a/b"])


def test_every_config_loads_and_the_page_of_keys_is_what_the_records_say():
    for file in (ROOT / "configs/ar").glob("*.yaml"):
        assert load_ar_config(file).run.name == file.stem
    page = (ROOT / "docs/ar_config.md").read_text()
    words = "run python -m flowrl.ar.configdoc > docs/ar_config.md"
    assert page == configdoc.to_markdown(), words


def test_a_trained_generator_is_aligned_by_the_trainer_and_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_config(tmp_path, run={"name": "base", "steps": 2})
    result = runner.invoke(app, ["ar", "train", str(file)])
    assert result.exit_code == 0, result.output
    base = tmp_path / "runs/base/final"
    config = tmp_path / "align.yaml"
    config.write_text(
        f"run: {{name: aligned, steps: 2, output_dir: {tmp_path / 'runs'}}}\n"
        f"model: {{pipeline: ar, id: {base}, guidance_scale: 2.0}}\n"
        "method: {name: grpo}\n"
        "data: {train: shapes/train, num_groups: 2, group_size: 2}\n"
        "rewards: [{name: colourfulness}]\n"
        "optim: {lr: 1e-3}\n"
        "compute: {micro_batch_size: 4, rollout_batch_size: 8, decode_batch_size: 4}\n"
        "eval: {max_prompts: 2}\n"
    )
    result = runner.invoke(app, ["train", str(config)])
    assert result.exit_code == 0, result.output
    assert "|ratio - 1| <= 0.0e+00" in result.output
    aligned = tmp_path / "runs/aligned"
    assert load_model(aligned / "final/pipeline").generator.vocab == 512
    prompt = "a photo of a red circle"
    result = runner.invoke(app, ["sample", str(aligned), prompt, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "out").glob("*.png"))
    wrong = config.read_text().replace("name: grpo", "name: mix_grpo").replace("aligned", "other")
    config.write_text(wrong)
    result = runner.invoke(app, ["train", str(config)])
    assert result.exit_code == 2 and "trains flow models" in result.output
