"""TokenFLEX: as many vision tokens as the language model that reads them can afford.

Paper: TokenFLEX, arXiv:2504.03154. The patch features of a vision transformer are averaged to n x n
and go through a gated projector; n is drawn anew for every training batch, so that one model serves
every count. Its tokens are continuous and made to be read, not to be decoded. Reading order:
`FlexiblePool`, which works on any grid of features, then `TokenFlex`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.blocks import SwiGlu, Transformer, image_to_patches, patches_to_image
from tokenizers_vis.quantizers.base import LossTerm
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer
from tokenizers_vis.tokens import Codebook, Tokens, grid_layout


class FlexiblePool(nn.Module):
    """Averages a grid of features to n x n, and projects: W_o (SiLU(W_g P) * W_u P), P normed.

    Paper: TokenFLEX, arXiv:2504.03154, section 3. Where n does not divide the grid, the bins of
    the average overlap; at the grid's own size it is the identity.

    Args:
        dim: of the features.
        out_dim: of the tokens, the language model's width.
        hidden: of the projector.
    """

    def __init__(self, dim: int, out_dim: int, *, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.project = SwiGlu(dim, hidden, out_dim)

    def forward(self, features: Tensor, *, grid: Sequence[int], side: int) -> Tensor:
        """Tokens [B, side^2, out_dim], row by row.

        Args:
            features: [B, rows * columns, dim], row by row.
            grid: (rows, columns).
            side: n, at most rows and columns.
        """
        return self.project(self.norm(pooled(features, grid=grid, side=side)))  # type: ignore[no-any-return]


def pooled(features: Tensor, *, grid: Sequence[int], side: int) -> Tensor:
    """Means [B, side^2, D] of features [B, rows * columns, D]; bins as equal as can be.

    Raises:
        ValueError: more bins than features, which could only be repeated.
    """
    if not 1 <= side <= min(grid):
        raise ValueError(f"a grid of {tuple(grid)} averages to 1 to {min(grid)} a side, not {side}")
    maps = features.transpose(1, 2).unflatten(2, tuple(grid))
    return F.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class TokenFlexConfig:
    """The numbers of a TokenFlex; the paper's in brackets, where it says them.

    Attributes:
        image_size: of the square images, pixels.
        patch_size: of a patch, pixels; the grid's side is image_size / patch_size.
        dim: of a token.
        width, num_heads, depth: of the vision transformer [a pretrained one].
        hidden: of the projector.
        reader_depth: blocks of the reader that trains it where no language model does.
    """

    image_size: int = 64
    patch_size: int = 8
    dim: int = 128
    width: int = 128
    num_heads: int = 4
    depth: int = 4
    hidden: int = 256
    reader_depth: int = 2


class TokenFlex(VisualTokenizer):
    """A vision transformer and a flexible pool. See the module.

    It keeps n x n tokens for every n up to the grid's side, and the layout is that of the number
    asked for: fewer tokens are another, coarser grid, not a prefix. Draw the numbers by
    `TokenDropout("uniform", counts=(64, 144, 256), is_shared=True)`; how often the paper draws
    each is not published.

    Differs from the published model: the encoder is trained here, and what reads the tokens in
    `forward` is a small transformer that draws the image from them, because this package has no
    language model. Train `encode` under one where there is.
    """

    Config = TokenFlexConfig
    name = "tokenflex"
    is_decodable = False

    def __init__(self, config: TokenFlexConfig) -> None:
        side, rest = divmod(config.image_size, config.patch_size)
        if rest or not side:
            raise ValueError(
                f"image_size {config.image_size} does not divide by patch_size {config.patch_size}"
            )
        layouts = {n * n: grid_layout(n, n) for n in range(1, side + 1)}
        super().__init__(
            config,
            layout=layouts[side * side],
            codebooks=[Codebook("continuous", config.dim)],
            token_counts=list(layouts),
            sample_shape=(3, config.image_size, config.image_size),
        )
        self.grid, self.layouts = (side, side), layouts
        width, patch_dim = config.width, 3 * config.patch_size**2
        self.patch_in = nn.Linear(patch_dim, width)
        self.encoder = Transformer(width, config.depth, num_heads=config.num_heads, rotary_axes=2)
        self.pool = FlexiblePool(width, config.dim, hidden=config.hidden)
        self.reader_in = nn.Linear(config.dim, width)
        self.reader_query = nn.Parameter(0.02 * torch.randn(width))
        self.reader = Transformer(
            width, config.reader_depth, num_heads=config.num_heads, rotary_axes=2
        )
        self.reader_out = nn.Linear(width, patch_dim)

    def embed(self, ids: Tensor) -> Tensor:
        raise ValueError("a continuous token has no id; keep its embeddings")

    def forward(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        num_tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        """As everywhere. Images of one batch may keep different numbers of tokens.

        Those of fewer have theirs first, and the layout is that of the greatest number.
        """
        self.check_samples(images)
        features = self.features(images)
        if num_tokens is None:
            num_tokens = torch.full((len(images),), self.token_counts[-1], device=images.device)
        counts = num_tokens.unique().tolist()
        tokens = features.new_zeros(len(images), counts[-1], self.config.dim)
        drawn = torch.empty_like(images)
        for count in counts:  # of numbers, of which a batch has one, or a few
            chosen = num_tokens == count
            some = self.pool(features[chosen], grid=self.grid, side=isqrt(count))
            tokens[chosen, :count] = some.to(tokens.dtype)
            drawn[chosen] = self._read(some, count).to(drawn.dtype)
        mask = torch.arange(counts[-1], device=images.device) < num_tokens[:, None]
        losses = {"read_l2": LossTerm(1.0, (drawn - images).square().mean())}
        return TokenizerOutput(Tokens(tokens, mask, self.layouts[counts[-1]]), losses, drawn)

    def features(self, images: Tensor) -> Tensor:
        """Patch features [B, rows * columns, width], before they are averaged."""
        patches = image_to_patches(images * 2 - 1, self.config.patch_size)
        coords = self.layout.coords[:, 1:]
        return self.encoder(self.patch_in(patches), coords=coords)  # type: ignore[no-any-return]

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        tokens = self.pool(self.features(images), grid=self.grid, side=isqrt(num_tokens))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Tokens(tokens.float(), mask, self.layouts[num_tokens])

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        raise ValueError(f"the tokens of {self.name} are for a language model; it decodes none")

    def _read(self, tokens: Tensor, count: int) -> Tensor:
        """Images that the reader draws from tokens [B, count, C]: a query for every patch."""
        places = [self.layout.coords[:, 1:], self.layouts[count].coords[:, 1:]]
        queries = self.reader_query.expand(len(tokens), self.layout.num_tokens, -1)
        x = torch.cat([queries, self.reader_in(tokens)], dim=1)
        x = self.reader(x, coords=torch.cat(places))[:, : self.layout.num_tokens]
        size = self.config.image_size
        patches = self.reader_out(x)
        return (patches_to_image(patches, self.config.patch_size, height=size, width=size) + 1) / 2
