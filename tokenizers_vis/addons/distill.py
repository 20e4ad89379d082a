"""Distillation of a teacher's features, before and after quantisation.

Paper: UniWeTok's Pre-Post Distillation, arXiv:2602.14178. After quantisation the tokens themselves
learn to carry meaning, by the inexact straight-through gradient; before it, the encoder learns
with the exact one.
"""

from __future__ import annotations

import importlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.quantizers.base import LossTerm, masked_mean
from tokenizers_vis.teachers import Teacher
from tokenizers_vis.tokenizer import TokenizerOutput, VisualTokenizer
from tokenizers_vis.tokens import TokenLayout


class Distill(AddOn):
    """1 - cosine of projected tokens and a teacher's features.

    Paper: UniWeTok, arXiv:2602.14178. Teacher, weights and the shape of the projections are not
    published: the weights are ours, a projection is linear [C] -> SiLU -> linear.

    Where tokens are one grid and features [B, N, D] a square one, each token is taught its place's
    features, which are brought to the tokens' grid by area; otherwise the mean of an image's kept
    tokens is taught the mean of its features.

    Args:
        teacher: frozen: it is called without gradient, and neither trained, moved nor saved here;
            give it in evaluation mode on the images' device. In a configuration its place,
            "package.module:function".
        pre, post: weights of the two places; 0 = not there, and no projection is made.
        hidden: width of the projections.

    Raises:
        ValueError: both weights are 0, or there is no such teacher.
    """

    def __init__(
        self, teacher: Teacher | str, *, pre: float = 0.5, post: float = 0.5, hidden: int = 128
    ) -> None:
        super().__init__()
        if min(pre, post) < 0 or pre == post == 0:
            raise ValueError(f"distillation needs a weight: pre {pre}, post {post}")
        found = _teacher_at(teacher) if isinstance(teacher, str) else teacher
        self._teacher = (found,)  # in a tuple: its parameters are none of this module's
        self.weights = {"pre": pre, "post": post}
        self.hidden = hidden
        self.projections = nn.ModuleDict()

    def attach(self, tokenizer: VisualTokenizer) -> None:
        blank = torch.full((1, *tokenizer.sample_shape), 0.5)
        parameter = next(tokenizer.parameters())
        images = blank.to(parameter)
        with torch.no_grad():
            # In training mode some tokenizers change a state; this look must not.
            was_training = tokenizer.training
            tokens = tokenizer.eval().encode(images)
            tokenizer.train(was_training)
        dim = self.features(images).shape[-1]
        if self.weights["pre"] and tokens.features is None:
            raise ValueError(f"{tokenizer.name} keeps no features before quantisation: set pre = 0")
        widths = {"post": tokens.embeddings.shape[-1]}
        if tokens.features is not None:
            widths["pre"] = tokens.features.shape[-1]
        for place, weight in self.weights.items():
            if weight:
                self.projections[place] = nn.Sequential(
                    nn.Linear(widths[place], self.hidden), nn.SiLU(), nn.Linear(self.hidden, dim)
                ).to(parameter.device)

    def features(self, images: Tensor) -> Tensor:
        """The teacher's, [B, N, D] or [B, D], detached.

        Raises:
            ValueError: it gave another shape.
        """
        with torch.no_grad():
            found = self._teacher[0](images)
        if found.ndim not in (2, 3) or len(found) != len(images):
            raise ValueError(
                f"a teacher gives features [{len(images)}, N, D] or [{len(images)}, D], got "
                f"{list(found.shape)}"
            )
        return found.detach().float()

    def forward(
        self,
        images: Tensor,
        output: TokenizerOutput,
        *,
        progress: float,
        generator: torch.Generator | None,
    ) -> dict[str, LossTerm]:
        tokens = output.tokens
        target = self.features(images)
        placed = on_grid(target, tokens.layout)
        sources = {"pre": tokens.features, "post": tokens.embeddings}
        losses = {}
        for place, projection in self.projections.items():
            drawn = projection(sources[place]).float()
            if placed is not None:
                distance = masked_mean(cosine_distance(drawn, placed), tokens.mask)
            else:
                weight = tokens.mask[..., None].to(drawn.dtype)
                pooled = (drawn * weight).sum(1) / weight.sum(1).clamp_min(1)
                whole = target if target.ndim == 2 else target.mean(1)
                distance = cosine_distance(pooled, whole).mean()
            losses[f"distill_{place}"] = LossTerm(self.weights[place], distance)
        return losses


def _teacher_at(place: str) -> Teacher:
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"distill: teacher must be 'package.module:function', got '{place}': {error}"
        ) from error


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - cosine over the last axis, in [0, 2]."""
    return 1 - F.cosine_similarity(first, second, dim=-1)


def on_grid(features: Tensor, layout: TokenLayout) -> Tensor | None:
    """Features [B, N, D] of a square grid at the places of one grid of tokens, [B, L, D].

    None where features or tokens have no grid.
    """
    shapes = [segment.shape for segment in layout.segments]
    if features.ndim != 3 or len(shapes) != 1 or len(shapes[0]) != 2:
        return None
    side = math.isqrt(features.shape[1])
    if side * side != features.shape[1]:
        return None
    grid = features.transpose(1, 2).reshape(len(features), -1, side, side)
    return F.adaptive_avg_pool2d(grid, shapes[0]).flatten(2).transpose(1, 2)
