"""An adversary that learns to tell reconstructions from samples, for any decodable tokenizer.

Papers: VQGAN, arXiv:2012.09841 (patches, hinge); LARP, arXiv:2410.21264 (a transformer on clips,
non-saturating, LeCam); LeCam, arXiv:2104.03310. The training loop minimises `forward`'s loss with
the tokenizer's optimiser and `adversary_loss` with another. Reading order: `Adversarial`, the
losses, the two networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.holistic import Patches, QueryEncoder
from tokenizers_vis.quantizers.base import LossTerm
from tokenizers_vis.tokenizer import TokenizerOutput, VisualTokenizer

Game = Literal["hinge", "non_saturating"]


class Adversarial(AddOn):
    """Reconstructions are to look like samples to a network that learns to tell them apart.

    Not here: VQGAN's adaptive weight, which needs the gradient at the decoder's last layer, and
    LARP's smoothed labels and its step of the adversary in every fifth only.

    Args:
        game: "hinge", or "non_saturating" (the logistic losses of arXiv:1406.2661).
        network: "patch", which judges overlapping regions of every frame for itself, or
            "transformer", which judges a whole image or clip.
        weight: of the tokenizer's loss; LARP's is 0.3 beside L1 and a perceptual loss.
        start: progress before which both sides rest.
        lecam: weight of the LeCam regulariser in the adversary's loss; LARP's is 0.001.
        channels: of the patch network, one stride of two each.
        patch_size, patch_frames, dim, depth, num_heads: of the transformer.
    """

    needs_reconstruction = True
    means: Tensor
    num_seen: Tensor

    def __init__(
        self,
        *,
        game: Game = "hinge",
        network: Literal["patch", "transformer"] = "patch",
        weight: float = 0.1,
        start: float = 0.0,
        lecam: float = 0.0,
        channels: Sequence[int] = (32, 64),
        patch_size: int = 8,
        patch_frames: int = 1,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        if game not in _GAMES:
            raise ValueError(f"game must be one of {', '.join(_GAMES)}, got '{game}'")
        if network not in ("patch", "transformer"):
            raise ValueError(f"network must be 'patch' or 'transformer', got '{network}'")
        self.game, self.weight, self.start, self.lecam = game, weight, start, lecam
        self._network, self._channels = network, tuple(channels)
        self._patch, self._trunk = (patch_size, patch_frames), (dim, depth, num_heads)
        self.register_buffer("means", torch.zeros(2))  # of the scores of samples and of fakes
        self.register_buffer("num_seen", torch.zeros(()))

    def attach(self, tokenizer: VisualTokenizer) -> None:
        if not tokenizer.is_decodable or tokenizer.is_generative:
            raise ValueError(f"{tokenizer.name} gives no reconstruction to judge in training")
        if self._network == "patch":
            self.adversary = PatchJudge(self._channels)
        else:
            patches = Patches(tokenizer.sample_shape, *self._patch)
            self.adversary = WholeJudge(patches, *self._trunk)
        self.to(next(tokenizer.parameters()).device)

    def forward(
        self,
        images: Tensor,
        output: TokenizerOutput,
        *,
        progress: float,
        generator: torch.Generator | None,
    ) -> dict[str, LossTerm]:
        if progress < self.start:
            return {}
        adversary, drawn = self._judged(output)
        # A state dict is detached: the tokenizer's step must not touch the adversary.
        fake = functional_call(adversary, adversary.state_dict(), (drawn,))
        return {"adversarial": LossTerm(self.weight, fooling_loss(fake, self.game))}

    def adversary_loss(
        self, images: Tensor, output: TokenizerOutput, *, progress: float
    ) -> Tensor | None:
        if progress < self.start:
            return None
        adversary, drawn = self._judged(output)
        real, fake = adversary(images), adversary(drawn.detach())
        loss = telling_loss(real, fake, self.game)
        if self.lecam:
            self._remember(real, fake)
            loss = loss + self.lecam * lecam_penalty(real, fake, *self._anchors())
        return loss

    def _judged(self, output: TokenizerOutput) -> tuple[nn.Module, Tensor]:
        if self.adversary is None or output.reconstruction is None:
            raise ValueError("attach the add-on first, and give an output with a reconstruction")
        return self.adversary, output.reconstruction

    @torch.no_grad()
    def _remember(self, real: Tensor, fake: Tensor) -> None:
        now = torch.stack([real.mean(), fake.mean()]).float()
        self.means.lerp_(now, 1 - _DECAY)
        self.num_seen += 1

    def _anchors(self) -> tuple[Tensor, Tensor]:
        """Running means of the scores; corrected for the start from zero, as Adam's are."""
        real, fake = self.means / (1 - _DECAY**self.num_seen)
        return real, fake


_DECAY = 0.99  # of LeCam's running means
_GAMES = ("hinge", "non_saturating")


def fooling_loss(fake: Tensor, game: Game) -> Tensor:
    """What the tokenizer minimises, of the scores of its reconstructions."""
    return -fake.float().mean() if game == "hinge" else F.softplus(-fake.float()).mean()


def telling_loss(real: Tensor, fake: Tensor, game: Game) -> Tensor:
    """What the adversary minimises; a high score says "sample".

    Hinge: (E[max(0, 1 - real)] + E[max(0, 1 + fake)]) / 2, with the half of VQGAN's code.
    Non-saturating: E[softplus(-real)] + E[softplus(fake)].
    """
    real, fake = real.float(), fake.float()
    if game == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def lecam_penalty(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """E[(real - mean of fakes)^2] + E[(fake - mean of samples)^2].

    Paper: LeCam, arXiv:2104.03310: pulls both scores towards each other's running mean.
    """
    return (real.float() - fake_mean).square().mean() + (fake.float() - real_mean).square().mean()


class PatchJudge(nn.Module):
    """Scores of overlapping regions: [B, 3, H, W] -> [B, 1, h, w]; clips frame by frame.

    Paper: pix2pix, arXiv:1611.07004. Group norms: batch norms would change their statistics when
    the tokenizer's loss is taken.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for number, width in enumerate(channels):
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            if number:
                layers.append(nn.GroupNorm(1, width))
            layers.append(nn.LeakyReLU(0.2))
            before = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        frames = images.flatten(0, 1) if images.ndim == 5 else images
        return self.layers(frames * 2 - 1)  # type: ignore[no-any-return]


class WholeJudge(nn.Module):
    """One score of an image or clip, [B, *sample_shape] -> [B, 1]: a query that gathers it."""

    def __init__(self, patches: Patches, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.encoder = QueryEncoder(patches, 1, dim=dim, depth=depth, num_heads=num_heads)
        self.score = nn.Linear(dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.encoder(images)[:, 0])  # type: ignore[no-any-return]
