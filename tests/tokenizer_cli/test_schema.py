"""A config of `flowrl tokenizer train` is read strictly. Kills: a key that is dropped silently."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from flowrl.errors import ConfigError
from flowrl.tokenizer import configdoc
from flowrl.tokenizer.build import build_training
from flowrl.tokenizer.schema import load_tokenizer_config
from tests.tokenizer_cli.toys import FLEXTOK, GRID, toy_run, write_config

ROOT = Path(__file__).resolve().parents[2]


def refused(file, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_tokenizer_config(file, overrides)
    return str(caught.value)


def test_a_typo_names_file_key_and_closest_match(tmp_path):
    file = write_config(tmp_path, optim={"lr": 1e-3, "ema_decya": 0.9})
    message = refused(file)
    assert f"{file}: optim.ema_decya is not a key" in message
    assert "did you mean 'ema_decay'?" in message
    message = refused(write_config(tmp_path), "compute.batch_sise=4")
    assert "override 'compute.batch_sise=4'" in message and "'batch_size'" in message


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "give either tokenizer.name or tokenizer.start_from"),
        ({"name": "grid", "start_from": "x"}, "give either"),
        ({"start_from": "x", "args": {"vocab": 3}}, "tokenizer.args would do nothing"),
    ],
)
def test_a_tokenizer_is_new_or_there_already(tmp_path, section, words):
    assert words in refused(write_config(tmp_path, tokenizer=section))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compute.micro_batch_size=3", "does not divide"),
        ("optim.warmup_steps=7", "exceeds run.steps=6"),
        ("run.name=a/b", "plain folder name"),
        ("addons=[{name: a}, {name: a}]", "names 'a' 2 times"),
        ("dropout.full=0.5", "would do nothing with dropout.mode=none"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, override, words):
    assert words in refused(write_config(tmp_path), override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tokenizer.name=grit"], "did you mean 'grid'?"),
        (["tokenizer.args.vocav=3"], "did you mean 'vocab'?"),
        (["addons=[{name: nothing}]"], "addons.0: there is no add-on 'nothing'"),
        (["addons=[{name: 'tests.tokenizer_cli.toys:Critic', args: {stert: 1}}]"], "'start'"),
        (["dropout.mode=pow2"], "token dropout needs a tokenizer of several counts"),
        (["tokenizer.args.image_size=128"], "set tokenizer.args.image_size=64"),
        (["tokenizer={start_from: /nowhere}"], "/nowhere: there is no such folder"),
        (["data.source=/nowhere"], "data.source=/nowhere: there is no such folder"),
    ],
)
def test_parts_that_do_not_exist_or_fit_are_named(tmp_path, overrides, words):
    with pytest.raises(ConfigError) as caught:
        toy_run(tmp_path, *overrides)
    assert str(caught.value).startswith("toy.yaml: ") and words in str(caught.value)


CONFIGS = {  # bits per sample, as the configs' comments say, and its shape
    "shapes_vq": (64 * 9, (3, 64, 64)),
    "shapes_binary": (64 * 16, (3, 64, 64)),
    "shapes_flextok": (16 * math.log2(1000), (3, 64, 64)),
    "shapes_flextok_longer": (16 * math.log2(1000), (3, 64, 64)),
    "shapes_clips_larp": (32 * 9, (4, 3, 32, 32)),
}


def test_every_config_builds_its_tokenizer():
    files = sorted((ROOT / "configs/tokenizers").glob("*.yaml"))
    assert [file.stem for file in files] == sorted(CONFIGS)
    for file in files:
        # A second stage goes on from a run of the first, which there is none of here.
        of_ours = ["tokenizer.start_from=shapes_flextok"] if file.stem.endswith("_longer") else []
        config = load_tokenizer_config(file, of_ours)
        assert config.run.name == file.stem
        training = build_training(config, where=file.name)
        bits, shape = CONFIGS[file.stem]
        assert training.tokenizer.bits == pytest.approx(bits)
        assert training.tokenizer.sample_shape == shape
        assert (training.dropout is not None) == (len(training.tokenizer.token_counts) > 1)


def test_the_page_of_keys_is_what_the_records_say():
    page = (ROOT / "docs/tokenizer_config.md").read_text()
    words = "run python -m flowrl.tokenizer.configdoc > docs/tokenizer_config.md"
    assert page == configdoc.to_markdown(), words
    assert "[].mode" not in page and "`addons[].name`" in page


def test_an_adversary_of_a_sampling_decoder_is_refused(tmp_path):
    critic = [{"name": "tests.tokenizer_cli.toys:Critic"}]
    with pytest.raises(ConfigError, match="it has none in training"):
        toy_run(tmp_path, tokenizer=FLEXTOK, addons=critic)
    assert toy_run(tmp_path, tokenizer=GRID, addons=critic).learner.adversary is not None
