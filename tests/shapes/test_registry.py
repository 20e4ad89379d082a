"""Rewards by name, dotted path or file; the Shapes rewards and the smallest one."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import rewards
from rewards.base import FunctionReward
from rewards.cards import cards
from rewards.pairwise import PointwiseJudge
from rewards.shapes.verify import renders


@pytest.fixture(scope="module")
def batch():
    samples = list(renders(12, 99))
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    return images, [sample.request.metadata for sample in samples]


@pytest.fixture
def reward_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        textwrap.dedent("""
        def longest(prompts, *, scale=1.0):
            return [scale * len(prompt) for prompt in prompts]

        def needs(images, target):
            return (images.mean((1, 2, 3)) - target).abs().neg()

        def summed(images):
            return images.sum()

        def blind(threshold=1):
            return []

        class Half:
            inputs, scope, range = ("images",), "sample", (0, 1)

        CONSTANT = 3
    """)
    )
    return file


def test_every_name_makes_a_reward_that_scores(batch):
    images, rows = batch
    # Apart: those with a card, whose weights are on the Hub; one compares samples of one prompt,
    # and two need a server.
    for name in set(rewards.NAMES) - set(cards()) - {"win_rate", "remote", "remote_judge"}:
        reward = rewards.load(name)
        given = {"images": images, "prompts": [r["prompt"] for r in rows], "metadata": rows}
        scores = reward.score(**{key: given[key] for key in reward.inputs})
        assert scores.dtype == torch.float32 and scores.shape == (12,)
        assert set(reward.inputs) <= {"images", "prompts", "metadata"}, name
        assert reward.scope == "sample" and reward.higher_is_better
        low, high = reward.range
        assert ((scores >= low) & (scores <= high)).all()


def test_strict_and_graded_agree_on_what_is_right(batch):
    images, rows = batch
    shifted = rows[6:] + rows[:6]  # the same skills, other requests
    for metadata in (rows, shifted):
        strict, graded = (
            rewards.load(name).score(images=images, prompts=[], metadata=metadata)
            for name in ("shapes_strict", "shapes_graded")
        )
        assert torch.equal(strict == 1, graded == 1)
        assert set(strict.tolist()) <= {0.0, 1.0}
        if metadata is rows:
            assert strict.min() == 1
        else:
            assert strict.mean() < 0.5 < graded.mean() + 0.5
            assert ((graded > 0) & (graded < 1)).any()


def test_an_image_that_is_not_finite_is_invalid_not_zero(batch):
    images, rows = batch
    images = images.clone()
    images[3, 0, 5, 5] = float("nan")
    scores = rewards.load("shapes_strict").score(images=images, prompts=[], metadata=rows)
    assert torch.isnan(scores).tolist() == [index == 3 for index in range(12)]


def test_wrong_batches_are_refused(batch):
    images, rows = batch
    reward = rewards.load("shapes_strict")
    with pytest.raises(ValueError, match="expected images of 64 x 64 pixels, got 32 x 32"):
        reward.score(images=images[..., :32, :32], prompts=[], metadata=rows)
    with pytest.raises(ValueError, match="expected 12 rows of metadata, got 11"):
        reward.score(images=images, prompts=[], metadata=rows[:11])
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        reward.score(images=images[0], prompts=[], metadata=rows)


def test_brightness_golden():
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0] = 0.6  # one channel of three
    scores = rewards.load("brightness").score(images=images, prompts=[], metadata=[])
    assert scores.tolist() == pytest.approx([0.0, 0.2])


def test_scores_do_not_depend_on_the_batch(batch):
    images, rows = batch
    reward = rewards.load("shapes_graded")
    whole = reward.score(images=images, prompts=[], metadata=rows)
    alone = [reward.score(images=images[i : i + 1], prompts=[], metadata=rows[i : i + 1])
             for i in range(len(rows))]  # fmt: skip
    assert torch.equal(whole, torch.cat(alone))


def test_dotted_path_and_function(batch, reward_file):
    reward = rewards.load("rewards.shapes.reward:ShapesReward", graded=True)
    assert torch.equal(reward.score(images=batch[0], metadata=batch[1]), torch.ones(12))
    reward = rewards.load(f"{reward_file}:longest", scale=2.0)
    assert isinstance(reward, FunctionReward) and reward.inputs == ("prompts",)
    scores = reward.score(images=batch[0], prompts=["ab", "abc"], metadata=[])
    assert scores.tolist() == [4.0, 6.0]
    reward = rewards.load(f"{reward_file}:needs", target=0.0)
    assert reward.inputs == ("images",)
    assert reward.score(images=torch.ones(2, 3, 4, 4), prompts=[], metadata=[]).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("name", "args", "error", "message"),
    [
        ("shapes_strikt", {}, LookupError, "did you mean 'shapes_strict'.*brightness"),
        (
            "nothing.like.this:Name",
            {},
            LookupError,
            "reward 'nothing.like.this:Name': there is no module 'nothing'",
        ),
        ("rewards.simple:Brightnes", {}, LookupError, "did you mean 'Brightness'"),
        ("./absent.py:score", {}, LookupError, "there is no file .*absent.py"),
        ("{file}:longst", {}, LookupError, "did you mean 'longest'"),
        ("{file}:longest", {"scal": 2}, ValueError, "'scal' is not an .*did you mean 'scale'"),
        ("{file}:longest", {"prompts": []}, ValueError, "'prompts' is not an argument"),
        ("{file}:needs", {}, ValueError, "needs target"),
        ("{file}:blind", {}, ValueError, "reads nothing"),
        ("{file}:Half", {}, ValueError, "lacks higher_is_better, score"),
        ("{file}:CONSTANT", {}, ValueError, "expected a class or function"),
        ("brightness", {"scale": 2}, ValueError, "'scale' is not an argument.*takes none"),
        ("shapes_strict", {"graded": True}, ValueError, "'graded' is not an argument"),
    ],
)
def test_bad_names_and_arguments_are_explained(reward_file, name, args, error, message):
    with pytest.raises(error, match=message):
        rewards.load(name.format(file=reward_file), **args)


def test_a_function_must_return_one_number_per_sample(reward_file):
    reward = rewards.load(f"{reward_file}:summed")
    with pytest.raises(ValueError, match=r"summed returned shape \[\]; expected \[2\]"):
        reward.score(images=torch.ones(2, 3, 4, 4), prompts=[], metadata=[])


def test_a_file_may_hold_a_dataclass(tmp_path):
    file = tmp_path / "with_record.py"
    file.write_text(
        textwrap.dedent("""
        from __future__ import annotations
        from dataclasses import dataclass

        @dataclass
        class Scale:
            factor: float = 2.0

        def score(images):
            return Scale().factor * images.mean(dim=(1, 2, 3))
    """)
    )
    assert rewards.load(f"{file}:score").score(images=torch.ones(2, 3, 4, 4)).tolist() == [2, 2]


def test_a_missing_dependency_of_a_reward_is_shown_as_it_is(tmp_path):
    (tmp_path / "broken.py").write_text("import a_library_that_is_absent\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_absent"):
        rewards.load(f"{tmp_path / 'broken.py'}:score")


def test_importing_rewards_is_light():
    code = (
        "import sys, rewards; heavy = {'torch', 'numpy', 'skimage', 'scipy', 'flowrl'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_a_function_may_return_components_and_a_judge_takes_its_score(tmp_path):
    file = tmp_path / "parts.py"
    file.write_text(
        "def parts(images):\n"
        "    red, green, _ = images.mean(dim=(2, 3)).unbind(1)\n"
        "    return {'score': red, 'green': green}\n"
    )
    reward = rewards.load(f"{file}:parts")
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    output = reward.score(images=images)
    assert set(output) == {"score", "green"}
    torch.testing.assert_close(output["green"], images[:, 1].mean(dim=(1, 2)))
    judge = PointwiseJudge(reward)
    won = judge.compare(images[:1], images[1:2], ["p"])
    assert won.item() == float(output["score"][0] > output["score"][1])
    file.write_text("def parts(images):\n    return {'score': [1.0]}\n")
    with pytest.raises(ValueError, match=r"returned shape \[1\]; expected \[3\]"):
        rewards.load(f"{file}:parts").score(images=images)
