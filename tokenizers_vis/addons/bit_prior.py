"""A prior over binary tokens whose loss reaches the encoder: bits that are easier to predict.

Paper: UniWeTok's Generative-Aware Prior, arXiv:2602.14178, LARP's idea (arXiv:2410.21264) with
BitDance's head (arXiv:2602.14041).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.bit_head import BitHead, flip_bits
from tokenizers_vis.blocks import Transformer, causal_mask
from tokenizers_vis.quantizers.base import LossTerm, masked_mean
from tokenizers_vis.tokenizer import TokenizerOutput, VisualTokenizer
from tokenizers_vis.tokens import TokenLayout, Tokens


class BitPredictor(nn.Module):
    """A causal trunk over tokens' bits, in the layout's order, and a `BitHead` for the next ones.

    Args:
        num_bits: of a token.
        dim, depth, num_heads: of the trunk.
        head_dim, head_depth: of the head.
    """

    def __init__(
        self,
        num_bits: int,
        *,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        head_dim: int = 64,
        head_depth: int = 2,
    ) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(dim))
        self.bits_in = nn.Linear(num_bits, dim)
        self.trunk = Transformer(dim, depth, num_heads=num_heads, rotary_axes=3)
        self.head = BitHead(num_bits, dim, dim=head_dim, depth=head_depth)

    def conditions(self, bits: Tensor, layout: TokenLayout) -> Tensor:
        """What is known before every token: [B, L, dim] of bits [B, L, D]."""
        length = bits.shape[1]
        start = self.start.expand(len(bits), 1, -1)
        x = torch.cat([start, self.bits_in(bits[:, :-1])], dim=1)
        mask = causal_mask(length, device=x.device)
        return self.trunk(x, mask=mask, coords=_places(layout, length))  # type: ignore[no-any-return]

    def loss(
        self,
        tokens: Tokens,
        *,
        flip: float = 0.0,
        repeats: int = 4,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The head's mean loss of the kept tokens; its gradient reaches the embeddings."""
        seen = flip_bits(tokens.embeddings, flip, generator=generator)
        known = self.conditions(seen, tokens.layout)
        values = self.head.loss(tokens.embeddings, known, repeats=repeats, generator=generator)
        return masked_mean(values, tokens.mask)


class BitPrior(AddOn):
    """The loss of a `BitPredictor` that is trained with the tokenizer.

    Paper: UniWeTok, arXiv:2602.14178; size and weight of the prior are not published, these are
    ours. The gradient goes into the encoder by both ways, as what is predicted and as what it is
    predicted from, through the straight-through sign. Against the bits becoming constant stands
    the diversity of `GroupedBinary`'s entropy: watch `batch_entropy_nats`.

    Args:
        weight: of the loss.
        flip: share of the bits that are turned before the trunk reads them (BitDance).
        dim, depth, num_heads: as `BitPredictor`'s.
        head_dim, head_depth: as `BitPredictor`'s.
    """

    def __init__(
        self,
        *,
        weight: float = 0.01,
        flip: float = 0.05,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        head_dim: int = 64,
        head_depth: int = 2,
    ) -> None:
        super().__init__()
        self.weight, self.flip = weight, flip
        self.sizes = {
            "dim": dim, "depth": depth, "num_heads": num_heads,
            "head_dim": head_dim, "head_depth": head_depth,
        }  # fmt: skip
        self.predictor: BitPredictor | None = None

    def attach(self, tokenizer: VisualTokenizer) -> None:
        codebooks = tokenizer.codebooks
        if len(codebooks) != 1 or codebooks[0].kind != "lfq":
            kinds = sorted({codebook.kind for codebook in codebooks})
            raise ValueError(f"bit_prior needs tokens of bits; {tokenizer.name} has {kinds}")
        self.predictor = BitPredictor(codebooks[0].dim, **self.sizes)
        self.predictor.to(next(tokenizer.parameters()).device)

    def forward(
        self,
        images: Tensor,
        output: TokenizerOutput,
        *,
        progress: float,
        generator: torch.Generator | None,
    ) -> dict[str, LossTerm]:
        if self.predictor is None:
            raise RuntimeError("bit_prior is not attached to a tokenizer")
        loss = self.predictor.loss(output.tokens, flip=self.flip, generator=generator)
        return {"bit_prior": LossTerm(self.weight, loss)}


def _places(layout: TokenLayout, length: int) -> Tensor:
    """[L, 3]: the place in the order in [0, 1), row and column; NaN where there is none."""
    order = torch.arange(length, dtype=torch.float32) / layout.num_tokens
    return torch.cat([order[:, None], layout.coords[:length, 1:]], dim=1)
