"""The report is one page that stands alone, says what the files say, and says what is missing."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from flowrl.commands import report as command
from flowrl.config import dump_config, load_config
from flowrl.errors import ConfigError
from flowrl.train import overoptimisation
from flowrl.train.plots import Series, line_svg, smoothed, stack_svg
from flowrl.train.report import duration, make_report, number
from flowrl.train.runfiles import read_run

VOID = {"meta", "img", "br", "link"}


class Balance(HTMLParser):
    """Raises for an element that is closed without being open, or the other way round."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def page_of(run):
    page = make_report(run).read_text(encoding="utf-8")
    Balance(page)
    return page


def words(page):
    """The page's text: without styles and tags, white space as single blanks."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(text).split())


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_page_needs_nothing_but_itself(run):
    page = page_of(run)
    assert "<script" not in page and "@import" not in page
    addresses = set(re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s)>]+)', page))
    assert addresses
    assert all(each.startswith(("data:image/", "#")) for each in addresses)
    plain = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in plain.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")


def test_scores_before_and_after_are_those_of_the_files(run):
    first = json.loads((run / "eval" / "step_000000.json").read_text())
    last = json.loads((run / "eval" / "step_000006.json").read_text())
    text = words(page_of(run))
    change = f"+{last['score'] - first['score']:.3f}"
    head = f"base model {first['score']:.3f} step 6 {last['score']:.3f} change {change}"
    assert head in text
    for tag, value in first["skills"].items():
        after = last["skills"][tag]
        assert f"{tag.replace('_', ' ')} skill {value:.3f} {after:.3f} +{after - value:.3f}" in text
    assert f"{first['diversity']:.3f} → {last['diversity']:.3f}" in text
    assert "Of these 8, 2 pass shapes_strict in the first evaluation and 2 in the last" in text


def test_method_configuration_and_time_are_shown(run):
    text = words(page_of(run))
    assert "arXiv:2507.21802" in text
    assert "surrogate ppo_clip, clip_range 1e-4, adv_clip_max 5" in text
    assert "method.args.window 4 arguments of the method" in text
    assert "rewards.0.name" in text and "optim.betas" not in text  # defaults are left out
    assert "5 min 38 s" in text and "42.4 images/s" in text and "1a2b3c4d5e6f" in text
    assert "rollout" in text and "Every number on this page was read" in text


def test_the_pictures_are_the_files(run):
    page = page_of(run)
    assert page.count("data:image/png;base64,") == 16
    assert page.count("✓ pass") == 4 and page.count("✗ fail") == 12


def watch(run, gold, trained=(0.4, 0.6, 0.8), distance=(0.0, 0.1, 0.3), **monitor):
    """Gives evaluations (steps 0, 3, 6) a second reward, and the run a guard if one is given."""
    for index, step in enumerate((0, 3, 6)):
        edit(
            run / "eval" / f"step_00000{step}.json",
            rewards={"shapes_strict": trained[index], "gold": gold[index]},
            distance=distance[index],
        )
    config = run / "config.yaml"
    lines = "".join(f"  {key}: {value}\n" for key, value in monitor.items())
    kept = config.read_text().partition("monitor:")[0]
    config.write_text(kept + ("monitor:\n" + lines if lines else ""))
    if monitor:
        (run / "best").mkdir(exist_ok=True)
        (run / "best" / "best.json").write_text(json.dumps({"reward": "gold", "step": 3}))


@pytest.mark.parametrize(
    ("gold", "sentence"),
    [
        ((0.5, 0.71, 0.66), "gold peaked at step 3 (0.710) and is 0.660 at the end, step 6; "
         "the weights of step 3 are in best/."),
        ((0.5, 0.6, 0.7), "gold was still rising: its best is that of the last evaluation, 0.700 "
         "at step 6."),
        ((0.5, 0.4, 0.45), "gold was never above the base model's 0.500 and is 0.450 at the end"),
        ((0.5, 0.5, 0.5), "gold was never above the base model's 0.500 and is 0.500 at the end"),
        ((-2.0, -1.5, None), "gold peaked at step 3 (−1.500) and is no number at the end, step 6; "
         "the weights of step 3 are in best/."),
        ((None, None, None), "gold was never a finite number on the held-out prompts."),
    ],
)  # fmt: skip
def test_the_page_says_where_the_monitor_peaked(run, gold, sentence):
    watch(run, gold, reward="gold", early_stop=2)
    text = words(page_of(run))
    assert "The monitor: gold" in text and sentence in text
    assert text.count("best/.") == ("best/" in sentence)  # of another step, they are not shown


def test_the_monitor_is_set_against_what_is_trained_on_and_the_distance(run):
    watch(run, (0.5, 0.71, 0.66), reward="gold")
    page = page_of(run)
    text = words(page)
    assert "gold against shapes_strict" in text and "shapes_strict is trained on" in text
    assert "gold and shapes_strict by distance from the base" in text
    plane, by_distance = (
        re.search(rf'aria-label="{label}.*?</svg>', page, re.DOTALL)[0]
        for label in ("gold against", "gold and shapes_strict by")
    )
    assert "step 3, best" in plane and "step 6" in plane and "held-out mean" in plane
    assert "step 3, best" in by_distance and "0.3" in by_distance


def test_the_path_goes_through_the_evaluations_in_the_order_of_steps(run):
    watch(run, (0.5, 0.71, 0.66), trained=(0.4, 0.9, 0.8), reward="gold")
    files = read_run(run)
    best = overoptimisation.best_evaluation(files, "gold")
    assert best["step"] == 3
    points = [
        (each["rewards"]["shapes_strict"], each["rewards"]["gold"], each) for each in files.evals
    ]
    line, peak, end = overoptimisation._path(points, best, "", 1)
    assert line.points == [(0.4, 0.5), (0.9, 0.71), (0.8, 0.66)]
    assert (peak.points, peak.text) == ([(0.9, 0.71)], "step 3, best")
    assert (end.points, end.text) == ([(0.8, 0.66)], "step 6")


def test_curves_of_other_scales_have_axes_of_their_own(run):
    watch(run, (18.0, 21.0, 20.0), reward="gold")
    text = words(page_of(run))
    assert "gold by distance from the base" in text
    assert "shapes_strict by distance from the base" in text
    assert "gold and shapes_strict by distance" not in text


def test_a_named_proxy_stands_for_what_is_trained_on(run):
    watch(run, (0.5, 0.71, 0.66), reward="gold", proxy="shapes_strict")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: shapes_strict", "name: win_rate", 1))
    assert "shapes_strict stands for what is trained on" in words(page_of(run))


def test_without_a_guard_any_reward_that_is_not_trained_on_is_shown(run):
    assert overoptimisation.section(read_run(run)) is None
    watch(run, (0.5, 0.71, 0.66), distance=(None, None, None))
    text = words(page_of(run))
    assert "A reward that is not trained on: gold" in text
    assert "gold peaked at step 3 (0.710) and is 0.660 at the end, step 6." in text
    assert "The distance is measured where monitor.reward is set." in text


def test_curves_are_well_formed_and_share_no_ids(run):
    watch(run, (0.5, 0.71, 0.66), reward="gold")
    page = page_of(run)
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) >= 8
    for each in pictures:
        ElementTree.fromstring(each)
    ids = Counter(re.findall(r'\bid="([^"]+)"', page))
    assert all(count == 1 for count in ids.values())
    targets = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {a or b for a, b in targets} <= set(ids)


def test_colours_follow_the_theme(run):
    watch(run, (0.5, 0.71, 0.66), reward="gold")
    page = page_of(run)
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    for picture in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.search(r"(?:fill|stroke): #", picture), "a colour that no theme can change"


def test_the_same_run_gives_the_same_page(run):
    assert page_of(run) == page_of(run)


def test_texts_of_the_run_are_escaped(run):
    edit(run / "status.json", state="failed", reason="<b>&'\"")
    samples = json.loads((run / "eval" / "step_000000.json").read_text())["samples"]
    for step in ("0", "3", "6"):
        edit(run / "eval" / f"step_00000{step}.json", samples=[{**samples[0], "prompt": '"><i>'}])
    page = page_of(run)
    assert "<b>&" not in page and '"><i>' not in page
    assert """This run failed at step 6: <b>&'".""" in words(page)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("stopped", "This run was stopped at step 3 of 6: why."),
        ("failed", "This run failed at step 3 of 6: why."),
        ("running", "This run is going on, or was killed; its last metrics are of step 6."),
    ],
)
def test_an_unfinished_run_says_so(run, state, sentence):
    edit(run / "status.json", state=state, step=3, reason="why")
    assert sentence in words(page_of(run))


def test_a_run_killed_at_once_says_what_is_missing_and_why(run):
    for each in run.iterdir():
        if each.name != "config.yaml":
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    text = words(page_of(run))
    for sentence in (
        "How this run ended is not known; it logged nothing.",
        "There is no held-out evaluation.",
        "There are no samples, because there is no evaluation.",
        "No training step was logged.",
        "There are no final weights.",
        "There are no checkpoints.",
        "The run has no metrics.jsonl: it ended before its first training step.",
        "The run has no status.json: it was killed before it could write one.",
    ):
        assert sentence in text
    assert "nan" not in text.lower()


def test_one_evaluation_is_not_compared_with_itself(run):
    for step in (3, 6):
        (run / "eval" / f"step_00000{step}.json").unlink()
    text = words(page_of(run))
    assert "There is one evaluation only, so there is nothing to compare it with." in text
    assert "change" not in text.split("Held-out prompts")[0]
    assert "Of these 8, 2 pass shapes_strict." in text


def test_a_run_without_a_base_evaluation_does_not_claim_one(run):
    (run / "eval" / "step_000000.json").unlink()
    text = words(page_of(run))
    assert "held-out score, step 3" in text and "base model" not in text.split("Artefacts")[0]


def test_evaluations_of_an_abandoned_continuation_are_left_out(run):
    shutil.copy(run / "eval" / "step_000006.json", run / "eval" / "step_000009.json")
    edit(run / "eval" / "step_000009.json", step=9, score=0.999)
    text = words(page_of(run))
    assert "0.999" not in text
    assert "step_000009.json is left out: the run is at step 6" in text


def test_evaluations_made_in_different_ways_are_marked(run):
    edit(run / "eval" / "step_000006.json", num_steps=20)
    assert "different ways (num_steps was 10, then 20)" in words(page_of(run))


def test_damaged_files_are_named_and_the_rest_is_shown(run):
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "tra')
    (run / "method.json").write_text("{")
    (run / "eval" / "step_000003.json").write_text("[]")
    (run / "eval" / "step_000006" / "000.png").write_bytes(b"no picture")
    text = words(page_of(run))
    assert "Lines of metrics.jsonl that could not be read are left out: 10" in text
    assert "method.json could not be read" in text
    assert "step_000003.json holds no JSON object" in text
    assert "1 images that the evaluations name are not in the run's folder" in text
    assert "Of these 7," in text


def test_scores_that_could_not_be_computed_are_dashes(run):
    edit(run / "eval" / "step_000006.json", score=None, skills={"counting": None}, diversity=None)
    text = words(page_of(run))
    assert "step 6 – change –" in text and "counting skill 0.670 – –" in text


def test_a_fall_is_shown_as_one(run):
    edit(run / "eval" / "step_000006.json", score=0.5)
    page = page_of(run)
    assert re.search(r'<span class="down">−0\.125</span>', page)


def test_a_metric_that_was_always_zero_is_explained_on_a_logarithmic_axis(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"train/ratio_max_dev": 0.0} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "It was exactly 0 in every step" in words(page_of(run))


def test_the_code_for_lora_weights_is_python_and_names_the_model(run):
    shutil.rmtree(run / "final")
    (run / "final").mkdir()
    file = run / "config.yaml"
    dump_config(load_config(file, ["model.tuning=lora", "model.lora={rank: 4, alpha: 8}"]), file)
    (run / "final" / "pytorch_lora_weights.safetensors").write_bytes(bytes(2_000_000))
    page = page_of(run)
    code = unescape(re.search(r"<code>(import torch.*?)</code>", page, re.DOTALL)[1])
    compile(code, "snippet", "exec")
    assert 'DiffusionPipeline.from_pretrained(\n    resolve_model("shapes")' in code
    assert f'load_lora_weights("{run}/final")' in code
    assert "height" not in code and "width" not in code  # null in the config: the model's own
    assert "max_sequence_length=12" in code and "num_inference_steps=10" in code
    assert "LoRA weights of 2.0 MB" in words(page)


def test_the_code_for_a_whole_pipeline_is_python(run):
    code = unescape(re.search(r"<code>(import torch.*?)</code>", page_of(run), re.DOTALL)[1])
    compile(code, "snippet", "exec")
    assert f'from_pretrained("{run}/final/pipeline", dtype=torch.' in code and "lora" not in code


def test_large_images_are_made_smaller(run):
    for step in (0, 6):
        Image.new("RGB", (1024, 512), "red").save(run / "eval" / f"step_00000{step}" / "000.png")
    page = page_of(run)
    assert page.count("data:image/jpeg;base64,") == 2
    assert len(page) < 600_000


def test_a_failed_write_keeps_the_old_page(run, monkeypatch):
    path = make_report(run)
    before = path.read_text()
    edit(run / "status.json", state="failed")

    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        make_report(run)
    assert path.read_text() == before


def test_a_folder_that_is_no_run_is_refused_with_the_runs_beside_it(run, capsys):
    with pytest.raises(ConfigError, match=r"no such folder; .*: .*run$"):
        make_report(run.parent / "rum")
    with pytest.raises(ConfigError, match=r"not a run's folder: .*config\.yaml.*: .*run$"):
        make_report(run.parent)
    with pytest.raises(ConfigError, match="is a file"):
        make_report(run / "status.json")
    command.run(run)
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_values_of_a_configuration_of_another_version_are_all_shown(run):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config + "\nfuture: {knob: 3}\n")
    text = words(page_of(run))
    assert "future.knob 3" in text and "optim.eps" in text
    assert "this version of flowrl does not read the file" in text


def test_columns_skip_rows_without_the_metric(run):
    files = read_run(run)
    assert [x for x, _ in files.column("eval/score")] == [0, 3, 6]
    assert [x for x, _ in files.column("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert files.option("model.lora.rank") == 32 and files.option("a.b") is None


def test_numbers_read_well():
    values = {
        0.5: "0.500", -0.25: "−0.250", 1e-6: "1.00e-06", 1234.0: "1234", 123456.5: "1.23e+05",
        3: "3", 0.0: "0.000",
    }  # fmt: skip
    assert {value: number(value) for value in values} == values
    assert number(None) == number(math.nan) == "–"
    assert [number(x, signed=True) for x in (0.1, -0.1, 0.0)] == ["+0.100", "−0.100", "0.000"]
    assert [duration(s) for s in (5, 338, 7620)] == ["5 s", "5 min 38 s", "2 h 07 min"]


def test_smoothing_is_the_mean_of_the_last_points_and_leaves_nan_out():
    points = [(1, 1.0), (2, 3.0), (3, math.nan), (4, 5.0)]
    assert smoothed(points, 2) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 5.0)]
    assert math.isnan(smoothed([(1, math.nan)], 3)[0][1])


@pytest.mark.parametrize("num", [1, 2, 100])
def test_curves_of_any_length_can_be_drawn(num):
    points = [(float(x), math.nan if x == 1 and num > 1 else 0.1 * x) for x in range(num)]
    for log in (False, True):
        shifted = [(x, y + 1e-3) for x, y in points]
        svg = line_svg([Series("a", shifted, band=[0.1] * num)], label='"<&', log=log)
        assert ElementTree.fromstring(svg).attrib["aria-label"] == '"<&'
    ElementTree.fromstring(stack_svg([Series("a", points), Series("b", points, 2)], label="b"))


def test_a_logarithmic_axis_counts_in_powers_of_two():
    """Doublings are equally far apart, and their ticks are plain numbers."""
    svg = line_svg([Series("a", [(x, x) for x in (1.0, 2.0, 4.0, 8.0)])], label="l", x_log=True)
    root = ElementTree.fromstring(svg)
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [each for each in texts if each in ("1", "2", "4", "8")][:4] == ["1", "2", "4", "8"]
    marks = [float(each.attrib["x"]) for each in root.iter("{http://www.w3.org/2000/svg}use")
             if "y" in each.attrib and each.attrib.get("style", "").count("--s1")]  # fmt: skip
    steps = [b - a for a, b in itertools.pairwise(sorted(set(marks)))]
    assert len(steps) == 3 and max(steps) == pytest.approx(min(steps), rel=1e-3)
    assert line_svg([Series("a", [(3.0, 1.0)])], label="one", x_log=True).count("nan") == 0
