"""What the embedded model is trained on besides pixels: which object stands at which token.

Kills: a map indexed [x, y]; shapes and colours exchanged; shares that do not sum to one; an
architecture whose saved folder names a path of the machine that made it.
"""

import json
from pathlib import Path

import numpy as np
import torch

from flowrl.make.shapes_base import load_vae, what_is_where
from flowrl.make.shapes_model import build_vae
from rewards.shapes.grammar import Request, sample_scene
from rewards.shapes.render import Object, Scene
from rewards.shapes.vocabulary import COLORS, SHAPES


def test_an_object_is_where_it_stands_and_what_it_is() -> None:
    scene = Scene((Object("star", "cyan", x=44.0, y=12.0, radius=9.0),), background=0.9)
    found = what_is_where(scene)
    shapes, colors = found[: 1 + len(SHAPES)], found[1 + len(SHAPES) :]
    assert found.shape == (15, 8, 8) and found.dtype == np.float32
    row, column = 1, 5  # y = 12 lies in the token of pixels 8 to 15, x = 44 in 40 to 47
    assert shapes[1 + list(SHAPES).index("star"), row, column] > 0.95
    assert colors[1 + list(COLORS).index("cyan"), row, column] > 0.95
    assert shapes[0, 7, 0] == colors[0, 7, 0] == 1  # nothing in the far corner
    assert shapes[1:].sum() * 64 == np.float32(colors[1:].sum() * 64)
    np.testing.assert_allclose(shapes[1:].sum() * 64, np.pi * 81, rtol=0.01)


def test_shares_are_distributions_however_crowded() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = what_is_where(sample_scene(Request("counting", (("circle", None, 4),)), rng))
        np.testing.assert_allclose(found[: 1 + len(SHAPES)].sum(0), 1, atol=1e-5)
        np.testing.assert_allclose(found[1 + len(SHAPES) :].sum(0), 1, atol=1e-5)
        assert found.min() >= -1e-6


def test_a_vae_that_was_loaded_is_saved_without_its_folder(tmp_path: Path) -> None:
    vae = build_vae().eval()
    vae.save_pretrained(tmp_path / "one")
    loaded = load_vae(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    one, two = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")
    )
    assert one == two
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded(x).sample, vae(x).sample)
