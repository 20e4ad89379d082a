"""Making, saving and loading: what a user may get wrong is named."""

import json
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards.shapes.grammar import sample_scene, split
from rewards.shapes.render import render
from tests.tokenizers.test_contract import tiny
from tokenizers_vis.registry import (
    embedded,
    load_pretrained,
    make_tokenizer,
    save_pretrained,
    tokenizer_class,
)
from tokenizers_vis.weights import load_tensors


def test_a_mistyped_name_gets_the_closest():
    with pytest.raises(LookupError, match="did you mean 'flextok'"):
        make_tokenizer("flextoc")
    with pytest.raises(LookupError, match="no VisualTokenizer"):
        make_tokenizer("json:JSONDecoder")


def test_a_plugin_of_another_distribution_is_found_by_its_entry_point(tmp_path, monkeypatch):
    info = tmp_path / "flowrl_fake_tokens-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[flowrl.tokenizers]\nmy_grid = flowrl_fake_tokens:MyGrid\nlost = flowrl_fake_absent:X\n"
    )
    code = "from tokenizers_vis.grid import GridTokenizer\nclass MyGrid(GridTokenizer): pass\n"
    (tmp_path / "flowrl_fake_tokens.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert tokenizer_class("my_grid").__name__ == "MyGrid"
    with pytest.raises(LookupError, match="did you mean 'my_grid'"):
        tokenizer_class("my_gird")
    with pytest.raises(LookupError, match="tokenizer 'lost': No module named 'flowrl_fake_absent'"):
        tokenizer_class("lost")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"quantiser": "vq"}, "no argument 'quantiser'; did you mean 'quantizer'"),
        ({"vocab": "many"}, "grid: vocab: "),
        ({"quantizer": "pq"}, "quantizer: .*'vq'"),
        ({"image_size": 20}, r"does not divide by 2\^3"),
        ({"quantizer": "lfq", "num_bits": 32, "group_bits": 16}, "groups of 1 to 12 bits"),
    ],
)
def test_arguments_are_strict(args, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer("grid", args)


def test_lists_of_a_file_stand_for_tuples():
    assert make_tokenizer("grid", {"channels": [8, 16], "image_size": 16}).config.channels == (
        8,
        16,
    )


def test_a_folder_holds_a_readable_config_and_all_weights(tmp_path):
    tokenizer = tiny("grid vq")
    save_pretrained(tokenizer, tmp_path / "a")
    stored = json.loads((tmp_path / "a/config.json").read_text())
    assert stored["tokenizer"] == "grid" and stored["args"]["vocab"] == 32
    assert load_file(tmp_path / "a/model.safetensors").keys() == tokenizer.state_dict().keys()
    loaded = load_pretrained(tmp_path / "a")
    assert not loaded.training
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_weights_that_do_not_fit_are_named(tmp_path):
    """Mutation: `strict=False`."""
    save_pretrained(tiny("grid vq"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    first = next(iter(weights))
    missing = {key: value for key, value in weights.items() if key != first}
    save_file(missing | {"extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{first} is missing; extra is unknown"):
        load_pretrained(tmp_path)
    save_file(weights | {first: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{first} is \[1\], expected"):
        load_pretrained(tmp_path)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_pretrained("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="does not name a tokenizer"):
        load_pretrained(tmp_path)


def test_a_published_checkpoint_is_named_with_its_format(tmp_path):
    with pytest.raises(ValueError, match="grid reads what save_pretrained wrote"):
        load_pretrained("grid:someone/something")
    with pytest.raises(LookupError, match="did you mean 'flextok'"):
        load_pretrained("flextoc:someone/something")
    save_pretrained(tiny("grid vq"), tmp_path / "grid:a")  # a folder may be called so
    assert load_pretrained(tmp_path / "grid:a").name == "grid"


def test_a_torch_file_with_other_objects_is_not_opened(tmp_path):
    """Mutation: weights_only=False."""
    torch.save({"model": {}, "args": pathlib.PurePosixPath("a")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("name", embedded())
def test_a_tokenizer_of_ours_gives_scenes_back(name):
    """By its name alone; the bound lies well below what its README says it reaches."""
    rng = np.random.default_rng(5)
    asked = split("colors", held_out=True)[:8]
    drawn = np.stack([render(sample_scene(request, rng), rng) for request in asked])
    images = torch.from_numpy(drawn)
    tokenizer = load_pretrained(name)
    with torch.no_grad():
        again = tokenizer.decode(tokenizer.encode(images))
    error = float((again - images).square().mean())
    spread = float((images - images.mean((2, 3), keepdim=True)).square().mean())
    assert error < 0.2 * spread
