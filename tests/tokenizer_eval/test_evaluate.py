"""Every tokenizer goes through the evaluation; its record is plain, complete and deterministic.

Kills, among others: distortion that is measured against other images; bits of all tokens where a
prefix was asked for; a probe that draws from the global generator.
"""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from flowrl.errors import ConfigError
from flowrl.tokenizer.evaluation.ar_probe import ArSettings
from flowrl.tokenizer.evaluation.evaluate import Settings, chosen_counts, evaluate
from flowrl.tokenizer.evaluation.features import FeatureNetwork
from flowrl.tokenizer.evaluation.samples import Samples, load_samples, shapes_samples
from tokenizers_vis.registry import make_tokenizer


def _contract():
    """The table of tiny tokenizers of the contract's test."""
    file = Path(__file__).parents[1] / "tokenizers" / "test_contract.py"
    spec = importlib.util.spec_from_file_location("tokenizer_contract", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONTRACT = _contract()
MEANS = FeatureNetwork("means", "Mean colours of quarters.", lambda x: x.unfold(2, 8, 8).unfold(
    3, 8, 8).mean((4, 5)).flatten(1))  # fmt: skip
QUICK = Settings(
    batch_size=8,
    ar=ArSettings(steps=4, batch_size=4, dim=16, depth=1, num_heads=2, checks=2),
    num_shown=3,
    resamples=5,
)


def samples(tokenizer, num, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (num, *tokenizer.sample_shape)
    images = (torch.rand(shape, generator=generator) * 255).to(torch.uint8)
    return Samples(images, {"kind": torch.arange(num) % 3}, about="noise")


def run(tokenizer, settings=QUICK):
    pair = samples(tokenizer, 10, 1), samples(tokenizer, 24, 2)
    return evaluate(tokenizer, *pair, features=MEANS, settings=settings)


@pytest.mark.parametrize("case", CONTRACT.TINY)
def test_every_tokenizer_is_measured(case):
    tokenizer = CONTRACT.tiny(case)
    result = run(tokenizer)
    record = json.loads(json.dumps(result.record, allow_nan=False))
    counts = record["counts"]
    assert [row["num_tokens"] for row in counts] == list(chosen_counts(tokenizer, None))
    last = counts[-1]
    if tokenizer.is_decodable:
        assert last["psnr"]["low"] <= last["psnr"]["mean"] <= last["psnr"]["high"]
        assert -1 <= last["ssim"]["mean"] <= 1 and last["frechet"]["mean"] > 0
        assert set(result.pictures) == {"original", *(str(row["num_tokens"]) for row in counts)}
        assert record["speed"]["decode"]["evaluations"] >= 1
    else:
        assert last["psnr"] is None and record["speed"]["decode"] is None
    if math.isfinite(tokenizer.bits):
        assert last["bits"] == pytest.approx(tokenizer.bits)
        assert 0 <= last["entropy_bits"] <= last["bits"] + 1e-9
        by_position = record["ar_probe"]["by_position"]
        assert sum(by_position) == pytest.approx(record["ar_probe"]["bits_per_image"]["mean"])
        assert last["ar_bits"]["mean"] == pytest.approx(sum(by_position))
        assert len(by_position) == tokenizer.layout.num_tokens
    else:
        assert last["bits"] is None and record["ar_probe"] is None
    assert set(record["linear_probe"]["kind"]["counts"]) == {str(r["num_tokens"]) for r in counts}


@pytest.mark.parametrize("case", ["flextok pixels", "grid binary"])
def test_the_record_does_not_depend_on_the_global_generator(case):
    tokenizer = CONTRACT.tiny(case)
    torch.manual_seed(1)
    first = run(tokenizer).record
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = run(tokenizer).record
    assert torch.equal(torch.get_rng_state(), state)
    for record in (first, second):
        record.pop("speed")
    assert first == second


def test_distortion_is_of_the_decoded_images():
    tokenizer = CONTRACT.tiny("grid vq")
    held_out = samples(tokenizer, 10, 1)
    record = run(tokenizer).record
    with torch.no_grad():
        originals = held_out.pixels(slice(None))
        drawn = tokenizer.decode(tokenizer.encode(originals))
    errors = (drawn - originals).square().mean((1, 2, 3))
    row = record["counts"][0]
    assert row["mse"]["mean"] == pytest.approx(float(errors.mean()), rel=1e-5)
    assert row["psnr"]["mean"] == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-5)


def test_the_rate_of_a_prefix_is_that_of_its_tokens():
    """FlexTok of 4 registers and 8 * 5 * 5 * 5 = 1000 codes: k log2(1000) bits for k tokens."""
    tokenizer = CONTRACT.tiny("flextok pixels")
    rows = run(tokenizer).record["counts"]
    assert [row["num_tokens"] for row in rows] == [1, 2, 4]
    assert [row["bits"] for row in rows] == pytest.approx([k * math.log2(1000) for k in (1, 2, 4)])
    ar = [row["ar_bits"]["mean"] for row in rows]
    assert ar == sorted(ar) and ar[0] > 0
    assert rows[0]["psnr_gain"] is None
    gains = [row["psnr"]["mean"] for row in rows]
    assert rows[1]["psnr_gain"]["mean"] == pytest.approx(gains[1] - gains[0], abs=1e-5)


def test_a_generative_decoder_is_evaluated_once_per_step():
    tokenizer = CONTRACT.tiny("flextok pixels")
    record = run(tokenizer).record
    assert record["speed"]["decode"]["evaluations"] == tokenizer.config.solver.num_steps == 20
    assert run(CONTRACT.tiny("grid vq")).record["speed"]["decode"]["evaluations"] == 1


def test_what_cannot_be_measured_is_refused():
    tokenizer = CONTRACT.tiny("flextok pixels")
    with pytest.raises(ConfigError, match="keeps 1, 2, 3, 4 tokens, not 5"):
        run(tokenizer, Settings(counts=(2, 5)))
    grid = CONTRACT.tiny("grid vq")
    wrong = Samples(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="takes images"):
        evaluate(grid, wrong, wrong, features=MEANS)


def test_strict_reading_counts_scenes_whose_objects_are_found():
    """A tokenizer that gives the originals back reads as well as they do; noise reads nothing."""
    from flowrl.tokenizer.evaluation.distances import strict

    held_out = shapes_samples(12, seed=0, held_out=True)
    originals = held_out.pixels(slice(None))
    assert strict(originals, held_out)["mean"] > 0.9
    assert strict(originals.flip(0), held_out)["mean"] < 0.3  # the objects of other scenes
    assert strict(originals[:, :, ::2, ::2], held_out) is None


def test_a_clip_reads_if_every_frame_does():
    """One frame of another scene in every clip, and none of them reads."""
    from flowrl.tokenizer.evaluation.distances import strict

    clips = shapes_samples(8, (3, 3, 64, 64), seed=0, held_out=True)
    originals = clips.pixels(slice(None))
    assert strict(originals, clips)["mean"] == 1
    broken = originals.clone()
    broken[:, 2] = originals[:, 2].roll(1, 0)
    assert strict(broken, clips)["mean"] < 0.3
    assert strict(originals[..., ::2, ::2], clips) is None


def test_clips_of_shapes_carry_labels_and_are_measured():
    shape = (4, 3, 16, 16)
    pair = load_samples("shapes", shape, num_held_out=8, num_train=24, seed=0)
    assert [tuple(each.images.shape) for each in pair] == [(8, *shape), (24, *shape)]
    assert "8 clips of 4 frames of the Shapes world, 16 x 16" in pair[0].about
    assert pair[0].labels.keys() == {"shape", "color", "number"}
    tokenizer = CONTRACT.tiny("larp clips")
    result = evaluate(tokenizer, *pair, features=MEANS, settings=QUICK)
    assert result.record["counts"][0]["strict"] is None  # the canvas is not 64 x 64
    assert result.record["linear_probe"].keys() == pair[0].labels.keys()
    width = 4 * 16 + 2  # of the frames side by side
    assert {tuple(each.shape) for each in result.pictures.values()} == {(3, 3, 16, width)}
    original = result.pictures["original"][:, :, :, 16:32]
    assert torch.equal(original, pair[0].images[:3, 1])  # bit by bit


def test_a_folder_of_clips_is_measured_by_its_classes(tmp_path):
    from flowrl.tokenizer.files import write_png

    clips, _ = load_samples("shapes", (4, 3, 16, 16), num_held_out=12, num_train=1)
    for number, clip in enumerate(clips.images):
        file = tmp_path / ("odd" if number % 2 else "even") / f"c{number}x.png"
        file.parent.mkdir(exist_ok=True)
        write_png(clip.permute(0, 2, 3, 1).contiguous(), file)
    held_out, train = load_samples(str(tmp_path), (4, 3, 16, 16), num_held_out=4, num_train=9)
    assert held_out.about == f"{tmp_path}: 4 held-out clips, 8 others for the probes"
    known = {clip.numpy().tobytes(): number % 2 for number, clip in enumerate(clips.images)}
    for part in (held_out, train):
        assert part.labels["class"].tolist() == [known[c.numpy().tobytes()] for c in part.images]


def test_shapes_do_not_share_scenes_and_depend_on_the_seed():
    small = (3, 16, 16)
    held_out, train = (shapes_samples(20, small, seed=0, held_out=side) for side in (True, False))
    assert held_out.fingerprint == shapes_samples(20, small, seed=0, held_out=True).fingerprint
    assert held_out.fingerprint != shapes_samples(20, small, seed=1, held_out=True).fingerprint
    assert not torch.equal(held_out.images, train.images)
    assert all(len(found) - 1 == n for found, n in zip(held_out.objects, held_out.labels["number"],
                                                       strict=True))  # fmt: skip


def test_the_default_counts_are_powers_of_two_and_all():
    tokenizer = make_tokenizer("flextok", {**CONTRACT.FLEXTOK, "num_registers": 11})
    assert chosen_counts(tokenizer, None) == (1, 2, 4, 8, 11)
    assert chosen_counts(tokenizer, (7, 3, 3)) == (3, 7)
