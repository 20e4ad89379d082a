"""A model's folder: what is saved is loaded, and what is wrong with one is named."""

import json

import pytest
import torch

from pipelines.ar.pipeline import Autoregressive
from pipelines.ar.registry import Model, load_model, make_generator, save_model
from tests.ar.toys import toy_model
from tokenizers_vis.registry import load_pretrained, make_tokenizer


def test_a_folder_holds_all_that_a_model_is(tmp_path):
    model = toy_model()
    save_model(model, tmp_path / "a")
    again = Autoregressive(str(tmp_path / "a"))
    mine = Autoregressive.of(model)
    assert torch.equal(again.words(["a red star"]), mine.words(["a red star"]))
    tokens = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(0))
    rows = mine.encode(["a red star", ""])
    with torch.no_grad():
        assert torch.equal(
            again.logits(again.network, tokens, rows), mine.logits(mine.network, tokens, rows)
        )
        assert torch.equal(again.decode(tokens), mine.decode(tokens))
    again.save_full(tmp_path / "b")
    stored = (tmp_path / "b/pipeline/config.json").read_text()
    assert stored == (tmp_path / "a/config.json").read_text()


def test_an_embedded_tokenizer_is_named_not_copied(tmp_path):
    tokenizer = load_pretrained("shapes_vq")
    texts = toy_model().texts
    args = {"num_words": len(texts), "dim": 16, "depth": 1, "num_heads": 2}
    model = Model(make_generator("raster", args, tokenizer), tokenizer, texts, "shapes_vq")
    save_model(model, tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["visual_tokenizer"] == "shapes_vq"
    assert not (tmp_path / "m/visual_tokenizer").exists()
    assert load_model(tmp_path / "m").tokenizer.layout.num_tokens == 64


def test_what_is_wrong_is_named(tmp_path):
    save_model(toy_model(), tmp_path / "m")
    with pytest.raises(ValueError, match="height=32, but this model draws 16 pixels"):
        Autoregressive(str(tmp_path / "m"), height=32)
    with pytest.raises(ValueError, match="trained with prompts of 12 words"):
        Autoregressive(str(tmp_path / "m"), max_sequence_length=77)
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_model(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="no such folder, and it is no Hub id"):
        load_model("./nowhere")


def test_generators_are_found_by_name_and_refuse_other_tokens():
    tokenizer = make_tokenizer("grid", {"image_size": 16, "channels": [8, 8]})
    with pytest.raises(LookupError, match="did you mean 'raster'"):
        make_generator("rastr", {}, tokenizer)
    with pytest.raises(ValueError, match="no argument 'width'"):
        make_generator("raster", {"width": 3}, tokenizer)
    continuous = make_tokenizer("grid", {"image_size": 16, "channels": [8, 8], "quantizer": "kl"})
    with pytest.raises(ValueError, match="one id per token"):
        make_generator("raster", {"num_words": 4}, continuous)
