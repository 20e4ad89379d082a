"""A reward: red minus the other colours."""

from __future__ import annotations

from torch import Tensor


class Redness:
    """How much redder than green and blue an image is on average.

    Args:
        strength: factor on the difference, above 0.
    """

    inputs = ("images",)
    scope = "sample"
    higher_is_better = True

    def __init__(self, *, strength: float = 1.0) -> None:
        self.range = (-strength, strength)
        self._strength = strength

    def score(self, *, images: Tensor) -> dict[str, Tensor]:
        """Scores, float32 [B], of images [B, 3, H, W] in [0, 1], and the mean of every colour."""
        red, green, blue = images.mean(dim=(2, 3)).unbind(1)
        score = self._strength * (red - (green + blue) / 2)
        return {"score": score, "red": red, "green": green, "blue": blue}
