"""VQ, FSQ and LFQ of vector-quantize-pytorch behind our interface, with its traps disarmed.

A LayerNorm stands before every projection: without it FSQ's tanh saturates when the scale of its
input drifts, and one id is left (measured, see docs/tokenizers.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, VectorQuantize

from tokenizers_vis.bits import check_groups
from tokenizers_vis.quantizers.base import (
    LossTerm,
    Quantized,
    Quantizer,
    in_full_precision,
    masked_mean,
    straight_through,
)
from tokenizers_vis.tokens import Codebook


class Fsq(Quantizer):
    """Finite scalar quantisation: every channel is rounded to one of a few levels.

    Paper: FSQ, arXiv:2309.15505. The library's FSQ; even levels are asymmetric there, as in the
    paper.

    Args:
        in_dim: width of the features.
        levels: of every channel; their product is the vocabulary.
    """

    def __init__(self, in_dim: int, levels: Sequence[int]) -> None:
        super().__init__(Codebook("fsq", len(levels), math.prod(levels)))
        self.project = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, len(levels)))
        self.lattice = FSQ(list(levels))

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        projected = self.project(features).float()  # a lattice of 1000 points is beyond bfloat16
        embeddings, ids = self.lattice(projected)
        return Quantized(embeddings, projected, ids.long())

    def embed(self, ids: Tensor) -> Tensor:
        return self.lattice.indices_to_codes(ids)  # type: ignore[no-any-return]


class Vq(Quantizer):
    """A learned table with cosine distances, moved by exponential averages.

    Papers: VQ-VAE, arXiv:1711.00937; ViT-VQGAN for the cosine, arXiv:2110.04627. The rotation trick
    is off: the papers here are straight-through, and so is it, in evaluation too (the library's
    gradient stops there). The table moves in training with `sample` alone: encoding is a pure
    function in the middle of a training, too. The library draws what replaces a dead code from the
    global generator.

    Args:
        in_dim: width of the features.
        vocab: codes.
        dim: of a code.
        commitment: weight of |features - code|^2.
        decay: of the averages.
        dead_below: a code that is used less often per batch is placed on a feature anew.
    """

    def __init__(
        self,
        in_dim: int,
        vocab: int,
        *,
        dim: int = 8,
        commitment: float = 0.25,
        decay: float = 0.99,
        dead_below: float = 0.05,
    ) -> None:
        super().__init__(Codebook("vq", dim, vocab))
        self.commitment = commitment
        self.project = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim))
        self.table = VectorQuantize(
            dim=dim, codebook_size=vocab, use_cosine_sim=True, rotation_trick=False, decay=decay,
            threshold_ema_dead_code=dead_below, commitment_weight=0.0,
        )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        projected = F.normalize(self.project(features).float(), dim=-1)
        # As it stands before it moves: a code that is chosen and dies in the same step lies
        # elsewhere afterwards, and the features would be pulled there.
        table = self.table.codebook.clone()
        with in_full_precision(projected):
            _, ids, _ = self.table(projected.detach(), mask=mask, freeze_codebook=not sample)
        if mask is not None:
            ids = torch.where(mask, ids, 0)
        codes = F.embedding(ids, table)
        error = (projected - codes).square().mean(-1)
        losses = {"commitment": LossTerm(self.commitment, masked_mean(error, mask))}
        embeddings = straight_through(codes, projected)
        if mask is not None:
            embeddings = torch.where(mask[..., None], embeddings, 0)
        return Quantized(embeddings, projected, ids, losses)

    def embed(self, ids: Tensor) -> Tensor:
        return self.table.get_codes_from_indices(ids)  # type: ignore[no-any-return]


class Lfq(Quantizer):
    """Lookup-free quantisation: signs in groups, with the entropies of MAGVIT-2.

    Paper: MAGVIT-2, arXiv:2310.05737. The library's LFQ; a group of more than 12 bits is refused,
    because its table of corners would not fit. Its ids have the first bit highest, those of
    `GroupedBinary` lowest. Its loss is 0 in evaluation, and its entropy that of probabilities at
    temperature 0.01, whose gradient lives within 0.01 of zero.

    Args:
        in_dim: width of the features.
        num_bits: of a token.
        group_bits: of a group; divides num_bits.
        entropy, commitment: weights.
    """

    def __init__(
        self,
        in_dim: int,
        num_bits: int,
        *,
        group_bits: int = 8,
        entropy: float = 0.02,
        commitment: float = 0.1,
    ) -> None:
        check_groups(num_bits, group_bits)
        if entropy <= 0:  # the library weighs the commitment by it
            raise ValueError(f"the weight of the entropy must be above 0, got {entropy}")
        super().__init__(Codebook("lfq", num_bits, 2**group_bits, num_bits // group_bits))
        self.entropy = entropy
        self.project = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, num_bits))
        self.lattice = LFQ(
            dim=num_bits, codebook_size=2**group_bits, num_codebooks=self.codebook.groups,
            entropy_loss_weight=1.0, commitment_loss_weight=commitment / entropy,
            force_quantization_f32=True, keep_num_codebooks_dim=self.codebook.groups > 1,
        )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        projected = self.project(features).float()
        with in_full_precision(projected):  # the library does it on CUDA alone
            _, ids, loss = self.lattice(projected, mask=mask)
        ids = ids.long()
        embeddings = straight_through(self.embed(ids), projected)
        return Quantized(embeddings, projected, ids, {"entropy": LossTerm(self.entropy, loss)})

    def embed(self, ids: Tensor) -> Tensor:
        return self.lattice.indices_to_codes(ids)  # type: ignore[no-any-return]
