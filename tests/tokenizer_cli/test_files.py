"""`flowrl tokenizer encode` and `decode`: files of tokens, and images of them.

Kills, among others: ids cut off by the type they are stored in; ids read by another tokenizer than
the one that wrote them; a number of tokens that is ignored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from flowrl.__main__ import app
from flowrl.tokenizer.tokenfile import TokenFile, read_tokens, write_tokens
from tests.tokenizer_cli.toys import FLEXTOK, GRID, write_config
from tokenizers_vis.registry import load_pretrained, make_tokenizer, save_pretrained


def invoke(*arguments):
    return CliRunner().invoke(app, ["tokenizer", *map(str, arguments)])


def saved(folder: Path, section: dict, seed: int = 0, **args):
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(section["name"], {**section["args"], **args}).eval()
    save_pretrained(tokenizer, folder)
    return tokenizer


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("x/a.png", "x/b.png", "y/a.png"):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(file)
    return tmp_path / "pictures"


def as_tensor(file: Path):
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(
    ("section", "args"),
    [
        (GRID, {}),
        (GRID, {"quantizer": "binary", "num_bits": 8, "group_bits": 4}),
        (GRID, {"quantizer": "kl", "dim": 4}),
        (FLEXTOK, {}),
    ],
    ids=["vq", "binary groups", "continuous", "flextok"],
)
def test_images_become_tokens_and_images_again(tmp_path, pictures, section, args):
    tokenizer = saved(tmp_path / "t", section, **args)
    file, out = tmp_path / "tokens.safetensors", tmp_path / "out"
    done = invoke("encode", tmp_path / "t", pictures, "--out", file, "--batch-size", 2)
    assert done.exit_code == 0, done.output
    originals = torch.stack([as_tensor(pictures / n) for n in ("x/a.png", "x/b.png", "y/a.png")])
    with torch.no_grad():
        tokens = tokenizer.encode(originals)
        stored = read_tokens(file)
        assert stored.names == ("a.png", "b.png", "a.png")
        if tokens.ids is None:
            torch.testing.assert_close(stored.embeddings, tokens.embeddings, atol=1e-5, rtol=0)
        else:
            assert torch.equal(stored.ids, tokens.ids)
        done = invoke("decode", file, "--out", out, "--seed", 3)
        assert done.exit_code == 0, done.output
        noise = torch.Generator().manual_seed(3)
        expected = tokenizer.decode(tokens, generator=noise)
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "a_2.png", "b.png"]
    for image, name in zip(expected, ("a", "b", "a_2"), strict=True):
        drawn = as_tensor(out / f"{name}.png")
        assert (drawn - image).abs().max() < 0.6 / 255 + 1e-4  # rounded to 8 bits


def test_fewer_tokens_are_kept_and_shown(tmp_path, pictures):
    tokenizer = saved(tmp_path / "t", FLEXTOK)
    file = tmp_path / "two.safetensors"
    done = invoke("encode", tmp_path / "t", pictures, "--out", file, "--num-tokens", 2)
    assert done.exit_code == 0 and "3 x 2 tokens, 8 bits per image" in done.output  # of 16 codes
    stored = read_tokens(file)
    assert stored.ids.shape == (3, 2) and stored.length.tolist() == [2, 2, 2]
    invoke("decode", file, "--out", tmp_path / "two")
    done = invoke("decode", file, "--out", tmp_path / "one", "--num-tokens", 1)
    assert done.exit_code == 0, done.output
    with torch.no_grad():
        one = tokenizer.tokens_from_ids(stored.ids[:, :1])
        expected = tokenizer.decode(one, generator=torch.Generator().manual_seed(0))
    drawn = as_tensor(tmp_path / "one" / "b.png")
    assert (drawn - expected[1]).abs().max() < 0.6 / 255 + 1e-4
    done = invoke("encode", tmp_path / "t", pictures, "--num-tokens", 5)
    assert done.exit_code == 2 and "keeps 1, 2, 3 or 4 tokens, not 5" in done.output


def test_another_tokenizer_does_not_read_the_ids(tmp_path, pictures):
    saved(tmp_path / "t", GRID)
    file = tmp_path / "tokens.safetensors"
    invoke("encode", tmp_path / "t", pictures, "--out", file)
    saved(tmp_path / "other", GRID, seed=1)
    done = invoke("decode", file, "--tokenizer", tmp_path / "other", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "another tokenizer" in done.output
    (tmp_path / "t").rename(tmp_path / "moved")
    assert invoke("decode", file, "--out", tmp_path / "out").exit_code == 2
    done = invoke("decode", file, "--tokenizer", tmp_path / "moved", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output


def test_what_cannot_be_is_one_message(tmp_path, pictures):
    saved(tmp_path / "t", GRID)
    (tmp_path / "no.safetensors").write_text("no")
    file = tmp_path / "tokens.safetensors"
    invoke("encode", tmp_path / "t", pictures, "--out", file)
    for arguments, words in (
        (("encode", tmp_path / "none", pictures), "there is no such folder"),
        (("encode", tmp_path / "t", tmp_path / "a.png"), "cannot be read as an image"),
        (("encode", tmp_path / "t", tmp_path / "t"), "holds no images"),
        (("decode", tmp_path / "none"), "there is no such file"),
        (("decode", tmp_path / "no.safetensors"), "is no safetensors file"),
        (("decode", tmp_path / "t/model.safetensors"), "holds no tokens"),
        (("decode", file, "--num-steps", 3), "decodes in one forward; leave out --num-steps"),
        (("decode", file, "--num-tokens", 3), "keeps one of 16 tokens"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert words in done.output


@pytest.mark.parametrize(
    ("most", "stored"), [(255, "U8"), (256, "I16"), (32767, "I16"), (32768, "I32"), (2**31, "I64")]
)
def test_ids_are_stored_in_the_smallest_type_that_holds_them(tmp_path, most, stored):
    ids = torch.tensor([[0, most]])
    file = tmp_path / "a.safetensors"
    write_tokens(file, TokenFile("t", "f", ("a",), torch.tensor([2]), ids))
    with safe_open(file, framework="pt") as opened:
        assert opened.get_slice("ids").get_dtype() == stored
    assert torch.equal(read_tokens(file).ids, ids)


def test_train_leaves_a_tokenizer_that_encode_finds_in_the_run(tmp_path, pictures):
    done = invoke("train", write_config(tmp_path), "run.steps=2", "eval.every=0")
    assert done.exit_code == 0, done.output
    assert "grid: " in done.output and "80 bits per image" in done.output  # 16 x log2(32)
    run = tmp_path / "runs/toy"
    assert {f.name for f in run.iterdir()} >= {"config.yaml", "env.json", "status.json", "final"}
    file = tmp_path / "tokens.safetensors"
    assert invoke("encode", run, pictures, "--out", file).exit_code == 0
    assert read_tokens(file).tokenizer == str((run / "final").resolve())
    assert load_pretrained(run / "final").name == "grid"


def test_help_reads_well():
    done = invoke("--help")
    for word in ("train", "encode", "decode", "Train the tokenizer that CONFIG names"):
        assert word in done.output
