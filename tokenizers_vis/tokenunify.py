"""TokenUnify: pre-training by predicting hidden patches, the next one, and all that are to come.

Paper: TokenUnify, arXiv:2405.16847 (of electron-microscope volumes, with a Mamba). It is no
tokenizer but an objective for a transformer over patches: next-token prediction alone accumulates
its errors when it runs freely; predicting everything that remains from every prefix is to slow
that down. Reading order: `TokenUnify.forward`, the three predictions, `roll_out`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizers_vis.blocks import SwiGlu, Transformer, causal_mask, image_to_patches
from tokenizers_vis.quantizers.base import LossTerm, masked_mean


@dataclass(frozen=True)
class TokenUnifyConfig:
    """The numbers of a TokenUnify; the paper's in brackets.

    Attributes:
        image_size: of the square images, pixels [volumes].
        patch_size: of a patch, pixels [4 x 16 x 16 voxels].
        width, num_heads, depth: of the transformer [a Mamba].
        random_weight, next_weight, all_weight: of the three objectives; one of weight 0 is not
            computed [their mixture; the code alternates between them by epoch].
        hidden_share: of the patches, in the random objective.
        num_prefixes: prefixes of an image whose remainder is predicted in a step [1]; None = all.
    """

    image_size: int = 64
    patch_size: int = 8
    width: int = 128
    num_heads: int = 4
    depth: int = 4
    random_weight: float = 1.0
    next_weight: float = 1.0
    all_weight: float = 1.0
    hidden_share: float = 0.5
    num_prefixes: int | None = None


@dataclass(frozen=True)
class PretrainingOutput:
    """Named losses of a batch, each with its weight."""

    losses: dict[str, LossTerm]

    @property
    def loss(self) -> Tensor:
        """The weighted sum."""
        return torch.stack([term.weighted for term in self.losses.values()]).sum()


class TokenUnify(nn.Module):
    """One transformer, three heads. K patches x_1 to x_K, row by row, of D numbers in [-1, 1].

    The state h_n is the causal transformer's output behind n patches; h_0 stands for none.

    - random: L = -E_M log p(x_M | x_without_M): hidden patches, everything sees everything;
    - next:   L = -sum_i log p(x_i | x_<i): x_{n+1} from h_n;
    - all:    L = -sum_i log p(x_{i:K} | x_<i): every x_j, j > n, from h_n and j's place.

    Patches are continuous, so each is a squared error; each term is a mean over the patches that it
    predicts, where the paper sums. Differs from the published code: a transformer instead of a
    Mamba U-Net; causal masks give all prefixes in one forward, where the code cuts one; its
    `auto_mode` never got the epoch and so trained the next token alone.
    """

    Config = TokenUnifyConfig

    def __init__(self, config: TokenUnifyConfig) -> None:
        super().__init__()
        side, rest = divmod(config.image_size, config.patch_size)
        if rest or not side:
            raise ValueError(
                f"image_size {config.image_size} does not divide by patch_size {config.patch_size}"
            )
        if not config.random_weight + config.next_weight + config.all_weight > 0:
            raise ValueError("one of the three weights must be positive")
        self.config = config
        self.num_patches, self.patch_dim = side * side, 3 * config.patch_size**2
        width = config.width
        if not 1 <= round(config.hidden_share * self.num_patches) < self.num_patches:
            raise ValueError(
                f"hidden_share {config.hidden_share} of {self.num_patches} patches must hide some "
                "and not all"
            )
        if config.num_prefixes is not None and not 1 <= config.num_prefixes <= self.num_patches:
            raise ValueError(
                f"num_prefixes must be 1 to {self.num_patches}, got {config.num_prefixes}"
            )
        self.patch_in = nn.Linear(self.patch_dim, width)
        self.place = nn.Parameter(0.02 * torch.randn(self.num_patches, width))
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        self.trunk = Transformer(width, config.depth, num_heads=config.num_heads)
        self.random_head = nn.Linear(width, self.patch_dim)
        self.next_head = nn.Linear(width, self.patch_dim)
        self.query = nn.Parameter(0.5 * torch.randn(self.num_patches, width))
        self.all_head = SwiGlu(width, 2 * width, self.patch_dim)

    def forward(
        self, images: Tensor, *, progress: float = 0.0, generator: torch.Generator | None = None
    ) -> PretrainingOutput:
        """Losses "random", "next" and "all" of images float [B, 3, H, W] in [0, 1].

        `progress` is there for the training loop of tokenizers; nothing here has a schedule.
        """
        config, patches = self.config, self.patches(images)
        losses = {}
        if config.random_weight:
            hidden = self.draw_hidden(len(images), generator).to(images.device)
            error = self._errors(self.predict_hidden(patches, hidden), patches)
            losses["random"] = LossTerm(config.random_weight, masked_mean(error, hidden))
        if config.next_weight or config.all_weight:
            states = self.states(patches)[:, : self.num_patches]
            if config.next_weight:
                error = self._errors(self.next_head(states), patches)
                losses["next"] = LossTerm(config.next_weight, error.mean())
            if config.all_weight:
                losses["all"] = LossTerm(
                    config.all_weight, self._all_loss(states, patches, generator)
                )
        return PretrainingOutput(losses)

    # ------------------------------------------------------------------ the predictions

    def patches(self, images: Tensor) -> Tensor:
        """[B, K, D] in [-1, 1]; raises ValueError for images of another shape."""
        size = self.config.image_size
        if not images.is_floating_point() or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"TokenUnify takes float images [B, 3, {size}, {size}] in [0, 1], got "
                f"{images.dtype} {list(images.shape)}"
            )
        return image_to_patches(images * 2 - 1, self.config.patch_size)

    def states(self, patches: Tensor) -> Tensor:
        """h_0 to h_n [B, n + 1, width] of the first n patches [B, n, D]."""
        x = self._sequence(patches)
        return self.trunk(x, mask=causal_mask(x.shape[1], device=x.device))  # type: ignore[no-any-return]

    def predict_next(self, patches: Tensor) -> Tensor:
        """[B, K, D]: patch n + 1 from the true n before it."""
        return self.next_head(self.states(patches)[:, : self.num_patches])  # type: ignore[no-any-return]

    def predict_all(self, states: Tensor) -> Tensor:
        """[B, N, K, D]: every patch from each of N states [B, N, width].

        Of a state h_n only patches n + 1 to K are trained.
        """
        return self.all_head(states[:, :, None] + self.query)  # type: ignore[no-any-return]

    def predict_hidden(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """[B, K, D]: what stands at every place, of which bool hidden [B, K] are not shown."""
        shown = torch.where(hidden[..., None], self.hidden, self.patch_in(patches)) + self.place
        return self.random_head(self.trunk(shown))  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> Tensor:
        """[B, width] of whole images, for a probe: the mean of the states that see all patches."""
        return self.trunk(self.patch_in(self.patches(images)) + self.place).mean(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def roll_out(self, patches: Tensor) -> Tensor:
        """Patches [B, K, D] whose first ones [B, n, D] are given and the others predicted.

        Each from those before it, its own predictions among them: K - n forwards of one position,
        with a cache.
        """
        cache = self.trunk.new_cache()
        x = self._sequence(patches)
        state = self.trunk(x, mask=causal_mask(x.shape[1], device=x.device), cache=cache)[:, -1:]
        found = [patches]
        for place in range(patches.shape[1], self.num_patches):
            found.append(self.next_head(state))
            token = self.patch_in(found[-1]) + self.place[place]
            state = self.trunk(token, cache=cache)
        return torch.cat(found, dim=1)

    def draw_hidden(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Bool [num, K]: which patches are hidden, the same number in every image."""
        count = round(self.config.hidden_share * self.num_patches)
        rank = torch.rand(num, self.num_patches, generator=generator).argsort(1).argsort(1)
        return rank < count

    # ------------------------------------------------------------------ parts

    def _sequence(self, patches: Tensor) -> Tensor:
        """The start and n embedded patches [B, n + 1, width]."""
        embedded = self.patch_in(patches) + self.place[: patches.shape[1]]
        return torch.cat([self.start.expand(len(patches), 1, -1), embedded], dim=1)

    def _all_loss(
        self, states: Tensor, patches: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """The mean error over the pairs of a prefix h_n and a later patch."""
        device = states.device
        known = torch.arange(self.num_patches).expand(len(states), -1)
        if self.config.num_prefixes is not None:
            order = torch.rand(len(states), self.num_patches, generator=generator).argsort(1)
            known = order[:, : self.config.num_prefixes]
        known = known.to(device)
        chosen = states.gather(1, known[..., None].expand(-1, -1, states.shape[-1]))
        error = self._errors(self.predict_all(chosen), patches[:, None])
        later = torch.arange(self.num_patches, device=device) >= known[..., None]
        return masked_mean(error, later)

    @staticmethod
    def _errors(predicted: Tensor, patches: Tensor) -> Tensor:
        """Squared errors, averaged over the numbers of a patch; float32."""
        return (predicted.float() - patches.float()).square().mean(-1)
