"""The page, from records to HTML, JSON and PNG; what does not compare is refused.

Kills, among others: a page that fetches anything; a claim that shows whatever the file says;
tokenizers side by side that saw other images.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from flowrl.__main__ import app
from flowrl.errors import ConfigError, DataError
from flowrl.tokenizer.evaluation.evaluate import Evaluation
from flowrl.tokenizer.evaluation.page import file_name, make_page, write_evaluation


def share(mean, half=0.1):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def row(count, ratio, *, bits=None, is_first=False):
    return {
        "num_tokens": count, "bits": bits, "entropy_bits": None if bits is None else 0.9 * bits,
        "ar_bits": None if bits is None else share(0.7 * bits, 1.0), "psnr": share(ratio),
        "psnr_gain": None if is_first else share(2.5), "mse": share(0.01), "ssim": share(0.8),
        "lpips": None, "frechet": share(3.0), "strict": share(0.5),
    }  # fmt: skip


def record(*counts, vocab=16):
    probe = {str(each["num_tokens"]): share(0.6) for each in counts}
    ar = None
    if vocab is not None:
        ar = {"bits_per_token": share(2.8), "bits_per_image": share(11.2), "by_position": [3, 2.6],
              "steps": 10, "batch_size": 4, "lr": 1e-3, "dim": 8, "depth": 1, "num_heads": 1,
              "validation": 0.1, "checks": 2, "train_bits_per_token": 2.5, "best_step": 10,
              "parameters": 99}  # fmt: skip
    times = {"images_per_s": 120.0, "tokens_per_s": 480.0, "evaluations": 20, "peak_mb": 3.5}
    return {
        "tokenizer": {"name": "toy", "config": {}, "sample_shape": [3, 8, 8], "num_tokens": 4,
                      "segments": [["register", [4]]], "is_generative": True,
                      "codebooks": [{"kind": "fsq", "dim": 4, "vocab": vocab, "groups": 2}],
                      "bits": 16.0, "solver": {"num_steps": 20, "guidance_scale": 1.0}},
        "data": {"about": "noise", "num_held_out": 10, "num_train": 20, "fingerprint": "abc",
                 "features": "means", "features_about": "Mean colours.", "lpips": None,
                 "strict_of_originals": None},
        "settings": {"seed": 0, "batch_size": 4},
        "counts": list(counts),
        "usage": {"used": 0.75, "entropy_bits": 3.25} if vocab else {},
        "linear_probe": {"shape": {"counts": probe, "pixels": share(0.4), "chance": 0.17}},
        "ar_probe": ar,
        "speed": {"batch_size": 4, "threads": 1, "device": "cpu", "parameters": 1_234_000,
                  "trained_parameters": 1_234_000, "encode": times, "decode": times},
    }  # fmt: skip


def evaluations(folder):
    pictures = {key: torch.zeros(2, 3, 8, 8, dtype=torch.uint8) + shade
                for key, shade in (("original", 9), ("2", 90), ("4", 200))}  # fmt: skip
    first = record(row(2, 14.25, bits=8.0, is_first=True), row(4, 21.75, bits=16.0))
    second = record(row(4, 33.125, is_first=True), vocab=None)
    for name, content in (("prefixes", first), ("latents <b>", second)):
        shown = {
            key: each
            for key, each in pictures.items()
            if key == "original" or int(key) in [r["num_tokens"] for r in content["counts"]]
        }
        write_evaluation(Evaluation(content, shown), folder / file_name(name), name=name,
                         source=f"runs/{name}")  # fmt: skip
    return folder


def test_the_page_shows_the_records_and_needs_nothing_else(tmp_path):
    claims = tmp_path / "claims"
    claims.mkdir()
    found = [{"claim": "error falls", "shows": True, "numbers": {"gain": [0.125, 0.25]}},
             {"claim": "bits <fall>", "shows": False,
              "numbers": {"probe": {"with_prior": 5.5}}}]  # fmt: skip
    (claims / "toy.json").write_text(json.dumps({"seeds": [0, 1], "steps": 7, "claims": found}))
    out = tmp_path / "docs" / "tokenizers.html"
    written = make_page([evaluations(tmp_path / "evals")], out, claims=claims)
    assert [path.name for path in written] == [
        "tokenizers.html", "tokenizers.json", "tokenizers.png"]  # fmt: skip
    page = out.read_text()
    for text in ("21.750", "33.125", "prefixes", "latents &lt;b&gt;", "Mean colours.",
                 "LPIPS is absent", "2 tokens", "14.250 dB", "1 of 2 show", "error falls",
                 "bits &lt;fall&gt;", "gain: 0.125, 0.250", "probe (with prior: 5.500)", "1.23",
                 "fsq, 2 x 16 codes", "continuous, 4 wide", "2.500 [2.400, 2.600]"):  # fmt: skip
        assert text in page, text
    assert page.count("✓ shows") == 1 and page.count("✗ does not show") == 1
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") == 4  # the originals once, three strips
    data = json.loads((tmp_path / "docs" / "tokenizers.json").read_text())
    assert [each["name"] for each in data["records"]] == ["latents <b>", "prefixes"]
    assert data["claims"][0]["claims"] == found


def test_a_strip_has_its_images_side_by_side(tmp_path):
    from PIL import Image

    images = torch.stack([torch.full((3, 4, 6), 10), torch.full((3, 4, 6), 200)]).to(torch.uint8)
    content = record(row(4, 20.0, is_first=True))
    write_evaluation(Evaluation(content, {"original": images, "4": images}), tmp_path, name="a",
                     source="b")  # fmt: skip
    strip = Image.open(tmp_path / "tokens_00004.png")
    assert strip.size == (12, 4)
    assert (strip.getpixel((5, 0)), strip.getpixel((6, 0))) == ((10,) * 3, (200,) * 3)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("fingerprint", "xyz", "on other images"), ("features", "other", "another feature network")],
)
def test_evaluations_that_do_not_compare_are_refused(tmp_path, key, value, words):
    folder = evaluations(tmp_path)
    file = folder / "prefixes" / "eval.json"
    content = json.loads(file.read_text())
    content["data"][key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words):
        make_page([folder], tmp_path / "page.html")


def test_two_of_one_name_and_empty_folders_are_refused(tmp_path):
    folder = evaluations(tmp_path / "evals")
    with pytest.raises(ConfigError, match="two evaluations are called prefixes"):
        make_page([folder / "prefixes", folder / "prefixes"], tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"holds no eval\.json"):
        make_page([tmp_path / "claims"], tmp_path / "page.html")


def test_a_claim_without_its_verdict_is_refused(tmp_path):
    claims = tmp_path / "claims"
    claims.mkdir()
    (claims / "toy.json").write_text(json.dumps({"claims": [{"claim": "it is so"}]}))
    with pytest.raises(DataError, match=r"toy\.json: expected 'claims'"):
        make_page([evaluations(tmp_path / "evals")], tmp_path / "page.html", claims=claims)


def test_eval_and_report_from_the_command_line(tmp_path):
    """Two tiny tokenizers of random weights on the Shapes world, down to the page."""
    from tokenizers_vis.registry import make_tokenizer, save_pretrained

    args = {"image_size": 16, "channels": (8, 16)}
    for name, more in (("vq", {"vocab": 32}), ("bits", {"quantizer": "binary", "num_bits": 8,
                                                        "group_bits": 4})):  # fmt: skip
        torch.manual_seed(0)
        save_pretrained(make_tokenizer("grid", {**args, **more}), tmp_path / name / "final")
    script = tmp_path / "means.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())).save(
        str(script)
    )
    evals, page = tmp_path / "evals", tmp_path / "page.html"
    quick = ["--num-images", "8", "--num-train", "24", "--ar-steps", "3", "--features", str(script)]
    sources = [str(tmp_path / name) for name in ("vq", "bits")]
    runner = CliRunner()
    result = runner.invoke(app, ["tokenizer", "eval", *sources, "--out", str(evals), *quick])
    assert result.exit_code == 0, result.output
    assert "vq: 16 tokens, 80 bits" in result.output
    found = json.loads((evals / "bits" / "eval.json").read_text())
    assert found["data"]["features"] == "means" and found["counts"][0]["bits"] == 128
    assert set(found["linear_probe"]) == {"shape", "color", "number"}
    result = runner.invoke(app, ["tokenizer", "report", str(evals), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert "2 visual tokenizers" in page.read_text()


def test_clips_are_evaluated_and_the_page_says_so(tmp_path):
    from tokenizers_vis.registry import make_tokenizer, save_pretrained

    small = {"image_size": 16, "num_tokens": 4, "vocab": 16, "code_dim": 4, "dim": 16,
             "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1}  # fmt: skip
    script = tmp_path / "means.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())).save(
        str(script)
    )
    quick = ["--num-images", "6", "--num-train", "20", "--ar-steps", "0", "--features", str(script)]
    for name, frames in (("clips", {"num_frames": 4, "patch_frames": 2}), ("images", {})):
        torch.manual_seed(0)
        save_pretrained(make_tokenizer("larp", {**small, **frames}), tmp_path / name)
        command = ["eval", str(tmp_path / name), "--out", str(tmp_path / f"{name} eval"), *quick]
        result = CliRunner().invoke(app, ["tokenizer", *command])
        assert result.exit_code == 0, result.output
        (page,) = (make_page([tmp_path / f"{name} eval"], tmp_path / f"{name}.html"))[:1]
        text = page.read_text()
        assert ("samples are clips of 4 frames" in text) == (name == "clips")
        assert ("no Fréchet video distance" in text) == (name == "clips")
        assert "Strict reading is absent" in text
    record = json.loads((tmp_path / "clips eval/clips/eval.json").read_text())
    assert record["counts"][0]["strict"] is None and record["counts"][0]["frechet"]["mean"] > 0
    assert record["data"]["about"].startswith("6 clips of 4 frames")
    with pytest.raises(ConfigError, match="on other images"):
        make_page([tmp_path / "clips eval", tmp_path / "images eval"], tmp_path / "both.html")


def test_the_command_line_says_what_does_not_fit(tmp_path):
    from flowrl.commands.tokenizer_eval_tools import EvalOptions, evaluate_all, name_of, report

    options = EvalOptions(
        data="shapes", out=tmp_path, name=None, num_images=4, num_train=16, num_tokens=None,
        num_steps=None, guidance_scale=None, features="auto", lpips=None, lpips_backbone=None,
        ar_steps=0, batch_size=4, seed=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="would be called vq, vq"):
        evaluate_all(["a/vq", "b/vq/final"], options)
    with pytest.raises(ConfigError, match="whole numbers separated by commas"):
        evaluate_all(["a"], replace(options, num_tokens="1-4"))
    with pytest.raises(ConfigError, match=r"the page is an \.html file"):
        report([tmp_path], out=tmp_path / "page.md", claims=None)
    assert [name_of(each) for each in ("runs/vq/final", "org/flextok-d12", "./vq/")] == [
        "vq", "flextok-d12", "vq"]  # fmt: skip
