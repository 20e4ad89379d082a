"""Grouped binary tokens with SigLu: of UniWeTok and of BitDance's tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.bits import bits_of, check_groups, number_of
from tokenizers_vis.quantizers.base import (
    LossTerm,
    Quantized,
    Quantizer,
    in_full_precision,
    masked_mean,
    straight_through,
)
from tokenizers_vis.tokens import Codebook


def siglu(x: Tensor) -> Tensor:
    """2 sigmoid(x) - 1 = tanh(x / 2), in (-1, 1). Paper: UniWeTok, arXiv:2602.14178."""
    return torch.tanh(x / 2)


class GroupedBinary(Quantizer):
    """Signs of the features, in groups: 2^128 tokens without a table of them.

    Papers: BitDance, arXiv:2602.14041 (grouped signs and entropies); UniWeTok, arXiv:2602.14178
    (SigLu before the sign). On (-1, 1) entropy and commitment both push outward; unbounded, their
    gradients oppose each other beyond 1, and SigLu makes commitment redundant. The weights are
    ours: neither paper gives them. sign(0) = -1, as in both inference codes. Differs: E[p] is one
    mean for each group; BitDance's code has one for all groups together, so that groups which are
    constant, each at another corner, look diverse to it.

    Args:
        in_dim: width of the features.
        num_bits: of a token.
        group_bits: bits of which one entropy is taken, and one id made (first bit lowest).
        bound: "siglu", or "none" for plain features.
        entropy: weight of E[H(p)] - diversity * H(E[p]).
        diversity: weight of the second term within it.
        commitment: weight of (x - sign x)^2.
        temperature: of the corners' probabilities, softmax(2 x . corner / temperature). BitDance
            has 0.01, where the gradient lives only within 0.01 of zero.
    """

    corners: Tensor

    def __init__(
        self,
        in_dim: int,
        num_bits: int,
        *,
        group_bits: int = 8,
        bound: str = "siglu",
        entropy: float = 0.02,
        diversity: float = 1.0,
        commitment: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        check_groups(num_bits, group_bits)
        if bound not in ("siglu", "none"):
            raise ValueError(f"bound must be 'siglu' or 'none', got '{bound}'")
        super().__init__(Codebook("lfq", num_bits, 2**group_bits, num_bits // group_bits))
        self.group_bits = group_bits
        self.bound = bound
        self.entropy, self.diversity, self.commitment = entropy, diversity, commitment
        self.temperature = temperature
        self.project = nn.Sequential(
            nn.LayerNorm(in_dim, elementwise_affine=False), nn.Linear(in_dim, num_bits)
        )
        numbers = torch.arange(2**group_bits)
        self.register_buffer("corners", bits_of(numbers, group_bits), persistent=False)

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        x = self.project(features).float()
        if self.bound == "siglu":
            x = siglu(x)
        hard = torch.where(x > 0, 1.0, -1.0)  # torch.sign has a third value
        grouped = x.unflatten(-1, (self.codebook.groups, self.group_bits))
        ids = number_of(grouped)
        if self.codebook.groups == 1:
            ids = ids[..., 0]
        sure, diverse = self.entropies(grouped, mask)
        commitment = masked_mean((x - hard).square().mean(-1), mask)
        losses = {
            "entropy": LossTerm(self.entropy, sure - self.diversity * diverse),
            "commitment": LossTerm(self.commitment, commitment),
        }
        metrics = {
            "bit_entropy_nats": sure.detach() / self.group_bits,
            "batch_entropy_nats": diverse.detach() / self.group_bits,
            "abs_feature": masked_mean(x.detach().abs().mean(-1), mask),
        }
        return Quantized(straight_through(hard, x), x, ids, losses, metrics)

    def entropies(self, grouped: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """E[H(p)] and H(E[p]) of a group, nats, averaged over groups.

        Of grouped features [B, L, G, bits]. A corner's probability is the product of its bits', so
        the first is a sum over bits; the second needs the table of corners. Float32 also under
        autocast: in bfloat16 the logarithms of 2^bits small probabilities are noise.
        """
        with in_full_precision(grouped):
            return self._entropies(grouped.float(), mask)

    def _entropies(self, grouped: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        logit = 4 * grouped / self.temperature  # of bit +1 against bit -1
        entropy = F.softplus(-logit) * torch.sigmoid(logit) + F.softplus(logit) * torch.sigmoid(
            -logit
        )
        sure = masked_mean(entropy.sum(-1).mean(-1), mask)
        scores = 2 * grouped @ self.corners.T / self.temperature
        probability = torch.softmax(scores, dim=-1)
        weight = torch.ones(grouped.shape[:2], device=grouped.device) if mask is None else mask
        weight = weight.to(probability.dtype)
        mean = torch.einsum("bl,blgc->gc", weight, probability) / weight.sum().clamp_min(1)
        diverse = torch.special.entr(mean).sum(-1).mean()
        return sure, diverse

    def embed(self, ids: Tensor) -> Tensor:
        if self.codebook.groups == 1:
            ids = ids[..., None]
        return bits_of(ids, self.group_bits).flatten(-2)
