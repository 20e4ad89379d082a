"""The network that stands in for Inception, as shipped.

Kills, among others: weights of another network; features that do not see colours or blur; a
fall-back that passes for Inception.
"""

from flowrl.make.shapes_features import measure
from flowrl.tokenizer.evaluation.features import feature_rows, load_features
from flowrl.tokenizer.evaluation.samples import shapes_samples
from rewards.shapes.features import ShapesFeatures


def test_the_shipped_network_knows_shapes_and_its_distance_grows_as_images_get_worse():
    """Frechet distances of 256 held-out renders to others: clean, then more and more blurred."""
    found = measure(ShapesFeatures.load(), num=256, seed=5)
    assert min(found["shapes"], found["colors"], found["number"]) > 0.9
    for kind in ("blur", "noise", "grey"):
        distances = [found["distance/clean"]]
        distances += [value for key, value in found.items() if f"/{kind}" in key]
        assert distances == sorted(distances) and distances[-1] > 4 * distances[0], kind


def test_the_shipped_network_reads_other_sizes_and_says_what_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    found = load_features("auto")
    assert found.name == "Shapes classifier" and "no published FID" in found.about
    full, half = (shapes_samples(4, (3, size, size), seed=0, held_out=True).pixels(slice(None))
                  for size in (64, 32))  # fmt: skip
    rows = feature_rows(found, full), feature_rows(found, half)
    assert rows[0].shape == rows[1].shape == (4, 64)
    near, far = (rows[0] - rows[1]).norm(dim=1), (rows[0] - rows[0].roll(1, 0)).norm(dim=1)
    assert (near < far).all()
