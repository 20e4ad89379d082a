"""`flowrl rewards list | info | test | score`, as a person types them.

Kills: a reward that is not listed; a score beside the wrong file; a broken reward that passes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.utils import save_image
from typer.testing import CliRunner

from flowrl.__main__ import app
from flowrl.rewardsdoc import to_markdown
from rewards import NAMES

GOOD = """
def score(images, prompts):
    return images.mean(dim=(1, 2, 3)) + 0 * len(prompts)
"""
SORTED = """
def score(images):
    return images.mean(dim=(1, 2, 3)).sort().values
"""
PARTS = """
class Parts:
    inputs = ("images",)
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True

    def score(self, *, images):
        red, green, blue = images.mean(dim=(2, 3)).unbind(1)
        return {"score": red, "green": green}
"""


def typed(*words: object) -> Any:
    return CliRunner().invoke(app, ["rewards", *map(str, words)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in {"good": GOOD, "sorted_": SORTED, "parts": PARTS}.items():
        (tmp_path / f"{name}.py").write_text(text)
    for name, level in {"dark": 51, "light": 204}.items():
        save_image(torch.full((3, 8, 8), level / 255), tmp_path / f"{name}.png")
    save_image(torch.ones(3, 4, 6), tmp_path / "wide.png")
    return tmp_path


def test_all_rewards_are_listed() -> None:
    printed = typed("list")
    assert printed.exit_code == 0, printed.output
    first = [line.split()[0] for line in printed.output.splitlines() if line.strip()]
    assert set(NAMES) <= set(first)
    assert "yuvalkirstain/PickScore_v1" in printed.output
    rows = {line.split()[0]: line.split() for line in printed.output.splitlines() if line.strip()}
    assert rows["brightness"] == ["brightness", "images", "sample", "yes", "–"]
    assert rows["pickscore"][4] == "–"


def test_the_page_of_rewards_is_what_the_cards_say() -> None:
    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    assert page == to_markdown(), "run python -m flowrl.rewardsdoc > docs/rewards.md"


def test_info_has_the_card_and_the_arguments() -> None:
    printed = typed("info", "pickscore").output
    for word in ("Pick-a-Pic", "yuvalkirstain/PickScore_v1", "GB in float32", "batch_size"):
        assert word in printed
    assert "gradient: none declared" in typed("info", "pickscore").output
    brightness = typed("info", "brightness").output
    assert "Mean intensity" in brightness and "gradient: its score has one" in brightness


def test_a_name_that_is_wrong_is_refused_with_the_closest() -> None:
    for command in ("info", "test"):
        result = typed(command, "pikscore")
        assert result.exit_code == 2 and "did you mean 'pickscore'" in result.output


def test_a_good_reward_passes_and_a_broken_one_is_told_why(here: Path) -> None:
    passed = typed("test", "./good.py:score")
    assert passed.exit_code == 0 and "conforms" in passed.output, passed.output
    refused = typed("test", "./sorted_.py:score")
    assert refused.exit_code == 2
    assert "breaks the contract" in refused.output and "batch backwards" in refused.output


def test_scores_stand_beside_their_files(here: Path) -> None:
    printed = typed(
        "score", "./good.py:score", "light.png", "dark.png", "wide.png", "--prompt", "a"
    )
    assert printed.exit_code == 0, printed.output
    rows = [line.split() for line in printed.output.splitlines()[1:]]
    assert rows == [
        ["light.png", "a", "0.8000"], ["dark.png", "a", "0.2000"], ["wide.png", "a", "1.0000"]
    ]  # fmt: skip


def test_components_are_columns(here: Path) -> None:
    head, row = typed("score", "./parts.py:Parts", "dark.png").output.splitlines()
    assert head.split()[-1] == "./parts.py:Parts/green" and row.split()[-1] == "0.2000"


def test_what_does_not_fit_is_refused(here: Path) -> None:
    for words, expected in {
        ("./good.py:score", "dark.png", "light.png", "wide.png", "--prompt", "a", "--prompt", "b"):
            "3 images and 2 prompts",
        ("brightness", "good.py"): "good.py cannot be read as an image",
        ("brightness", "dark.png", "--arg", "x"): "expected KEY=VALUE",
        ("brightness", "dark.png", "--arg", "x=1"): "'x' is not an argument",
        ("shapes_strict", "dark.png", "--metadata", "[1]"): "expected a mapping",
    }.items():  # fmt: skip
        result = typed("score", *words)
        assert result.exit_code == 2 and expected in result.output, result.output
