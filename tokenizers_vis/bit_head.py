"""Binary diffusion head: draws a token's bits jointly, where a softmax over 2^bits cannot.

Paper: BitDance, arXiv:2602.14041. Bits are corners x0 of {-1, 1}^D; noise takes a corner to a
Gaussian, x_t = (1 - sigma) x0 + sigma x1, and a small network predicts the corner back. The paper
counts t = 1 - sigma, from noise to data. Reading order: `bit_diffusion_loss`, `bit_transition`,
`sample_bits` (pure, of any prediction), then `BitHead`, the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.blocks import SwiGlu, time_embedding

# (x_t [..., D], sigma [...]) -> the predicted x0 [..., D]
Predict = Callable[[Tensor, Tensor], Tensor]

MIN_SIGMA = 0.05  # below it the velocity of a prediction is not magnified further


def draw_sigma(
    shape: Sequence[int],
    *,
    mean: float = 0.8,
    std: float = 0.8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise levels sigmoid(N(mean, std^2)); the paper's t = sigmoid(N(-0.8, 0.8^2)) = 1 - sigma."""
    return torch.sigmoid(mean + std * torch.randn(*shape, generator=generator))


def bit_diffusion_loss(predict: Predict, x0: Tensor, sigma: Tensor, x1: Tensor) -> Tensor:
    """Squared error of the velocity, per token.

    Paper: BitDance, arXiv:2602.14041: |(x0_hat - x0) / max(sigma, .05)|^2, a mean over bits.

    Args:
        predict: of the clean bits.
        x0: bits [..., D], +-1; with a gradient where the loss is to teach who made them.
        sigma: [...], in (0, 1).
        x1: Gaussian noise [..., D].

    Returns:
        [...], float32.
    """
    level = sigma[..., None]
    x_t = (1 - level) * x0 + level * x1
    error = (predict(x_t, sigma) - x0).float() / level.clamp_min(MIN_SIGMA)
    return error.square().mean(-1)


def bit_transition(
    x_t: Tensor, x0_hat: Tensor, sigma: float | Tensor, sigma_next: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and std of one Euler-Maruyama step of the marginal-preserving SDE.

    Paper: BitDance's code. In t = 1 - sigma: velocity v = (x0_hat - x_t) / sigma, score
    s = (t v - x_t) / sigma = (t x0_hat - x_t) / sigma^2, drift v + sigma s, noise
    sqrt(2 sigma) dw. Every step is Gaussian, so a rollout of them has a log-probability.

    Args:
        x_t: [..., D].
        x0_hat: [..., D], predicted from it.
        sigma: its noise level; a number, or a tensor that broadcasts.
        sigma_next: below it.
    """
    sigma = torch.as_tensor(sigma, dtype=x_t.dtype, device=x_t.device)
    step = sigma - sigma_next
    drift = ((2 - sigma) * x0_hat - 2 * x_t) / sigma
    return x_t + step * drift, torch.sqrt(2 * sigma * step)


def bit_sigmas(num_steps: int, *, last_step: float = 0.05) -> Tensor:
    """Noise levels [num_steps + 2]: even stochastic steps from 1 to `last_step`, then one to 0."""
    if num_steps < 1:
        raise ValueError(f"a bit is drawn in at least 1 step, got {num_steps}")
    return torch.cat([torch.linspace(1, last_step, num_steps + 1), torch.zeros(1)])


@torch.no_grad()
def sample_bits(
    predict: Predict,
    shape: Sequence[int],
    *,
    num_steps: int = 20,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Bits [*shape], +-1: Euler-Maruyama, a last Euler step, the sign.

    The last step has the length of its noise level, so its Euler step lands on the prediction.

    Args:
        predict: evaluated num_steps + 1 times.
        shape: [..., D].
        num_steps: stochastic ones.
        generator: of the noise, which is drawn on the CPU.
        device: of the prediction.
    """

    def noise() -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    *path, last, _ = bit_sigmas(num_steps).tolist()
    x_t = noise()
    for sigma, sigma_next in itertools.pairwise([*path, last]):
        x0_hat = predict(x_t, torch.full(tuple(shape[:-1]), sigma, device=device)).float()
        mean, std = bit_transition(x_t, x0_hat, sigma, sigma_next)
        x_t = mean + std * noise()
    x0_hat = predict(x_t, torch.full(tuple(shape[:-1]), last, device=device))
    return torch.where(x0_hat > 0, 1.0, -1.0)


class BitHead(nn.Module):
    """The clean bits from noisy ones, a noise level and a condition: an MLP with AdaLN.

    Paper: BitDance, arXiv:2602.14041. Blocks in a row share a modulation.

    Args:
        num_bits: D of a token.
        condition_dim: width of the condition, e.g. of a trunk's output.
        dim: width.
        depth: blocks.
        num_modulations: that they share evenly.
    """

    def __init__(
        self,
        num_bits: int,
        condition_dim: int,
        *,
        dim: int = 128,
        depth: int = 3,
        num_modulations: int = 1,
    ) -> None:
        super().__init__()
        if depth % num_modulations:
            raise ValueError(f"{depth} blocks do not divide into {num_modulations} modulations")
        self.num_bits, self.dim = num_bits, dim
        self.bits_in = nn.Linear(num_bits, dim)
        self.time_in = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.condition_in = nn.Linear(condition_dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(depth))
        self.mlps = nn.ModuleList(SwiGlu(dim, 3 * dim // 2) for _ in range(depth))
        self.modulations = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(num_modulations))
        self.last_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.last_modulation = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, num_bits)
        for layer in [*self.modulations, self.last_modulation, self.out]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Predicted bits [..., D] of x_t [..., D], sigma [...], condition [..., condition_dim]."""
        time = time_embedding(1 - sigma.flatten(), self.dim).reshape(*sigma.shape, self.dim)
        seen = F.silu(self.time_in(time.to(x_t)) + self.condition_in(condition))
        x = self.bits_in(x_t)
        shared = len(self.mlps) // len(self.modulations)
        for number, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            if number % shared == 0:
                shift, scale, gate = self.modulations[number // shared](seen).chunk(3, dim=-1)
            x = x + gate * mlp(norm(x) * (1 + scale) + shift)
        shift, scale = self.last_modulation(seen).chunk(2, dim=-1)
        return self.out(self.last_norm(x) * (1 + scale) + shift)  # type: ignore[no-any-return]

    def loss(
        self,
        bits: Tensor,
        condition: Tensor,
        *,
        repeats: int = 4,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Per token [...]: a mean over `repeats` draws of noise level and noise [C: 4].

        Args:
            bits: [..., D], +-1.
            condition: [..., condition_dim].
            repeats: of the head alone; the trunk behind the condition runs once.
            generator: of the draws.
        """
        many = (repeats, *bits.shape)
        sigma = draw_sigma(many[:-1], generator=generator).to(bits.device)
        x1 = torch.randn(many, generator=generator).to(bits)
        wide = condition.expand(repeats, *condition.shape)
        values = bit_diffusion_loss(
            lambda x_t, level: self(x_t, level, wide), bits.expand(many), sigma, x1
        )
        return values.mean(0)

    def sample(
        self,
        condition: Tensor,
        *,
        num_steps: int = 20,
        guidance_scale: float = 1.0,
        unconditional: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Bits [..., D], +-1.

        Args:
            condition: [..., condition_dim].
            num_steps: see `sample_bits`.
            guidance_scale: uncond + scale * (cond - uncond), of velocities and so of predictions.
            unconditional: [..., condition_dim], where the scale is not 1.
            generator: of the noise.

        Raises:
            ValueError: a scale without an unconditional.
        """
        if guidance_scale != 1.0 and unconditional is None:
            raise ValueError("guidance needs the condition of no prompt: unconditional [..., C]")

        def predict(x_t: Tensor, sigma: Tensor) -> Tensor:
            found: Tensor = self(x_t, sigma, condition)
            if guidance_scale == 1.0:
                return found
            plain: Tensor = self(x_t, sigma, unconditional)
            return plain + guidance_scale * (found - plain)

        shape = (*condition.shape[:-1], self.num_bits)
        return sample_bits(
            predict, shape, num_steps=num_steps, generator=generator, device=condition.device
        )


def flip_bits(bits: Tensor, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Bits of which each is turned with probability `rate`.

    Paper: BitDance, arXiv:2602.14041: what a trunk reads in training (.05 to .1), so that a wrong
    bit of its own does not lead it astray in generation.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate lies in [0, 1], got {rate}")
    if math.isclose(rate, 0):
        return bits
    turned = torch.rand(bits.shape, generator=generator).to(bits.device) < rate
    return torch.where(turned, -bits, bits)
