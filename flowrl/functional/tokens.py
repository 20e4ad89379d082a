"""Discrete decisions: log-probability and entropy of tokens under logits.

The counterpart of `sde` for autoregressive policies. Both take the temperature that the sampler
used: a log-prob at another temperature belongs to another policy. float32 at least, whatever the
model's dtype. Guided logits are a distribution of their own: what was drawn under guidance is
scored under it.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from flowrl.functional.shapes import at_least_float32


def token_log_prob(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of `tokens`: log softmax(logits / temperature) at them.

    Args:
        logits: [..., V]; -inf forbids a token.
        tokens: int64 [...], in [0, V).
        temperature: positive, the sampler's.

    Returns:
        float32 [...], float64 if logits are.

    Raises:
        ValueError: shapes that do not fit, tokens that are not int64, temperature not positive.
    """
    if tokens.dtype != torch.int64 or tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"tokens must be int64 {list(logits.shape[:-1])} for logits {list(logits.shape)}, "
            f"but are {tokens.dtype} {list(tokens.shape)}; "
            "drop the last logit or the first token to align them."
        )
    log_probs = _log_softmax(logits, temperature)
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), in [0, log V].

    Args:
        logits: [..., V]; -inf forbids a token, which then adds nothing, nor to the gradient.
        temperature: positive, the sampler's.

    Returns:
        float32 [...], float64 if logits are.

    Raises:
        ValueError: temperature not positive.
    """
    log_probs = _log_softmax(logits, temperature)
    surprise = -log_probs.masked_fill(log_probs == -torch.inf, 0.0)  # 0 * inf would be nan
    return (log_probs.exp() * surprise).sum(-1)


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance of logits [..., V]: u + s (c - u); 1 = conditional alone.

    Paper: classifier-free guidance, arXiv:2207.12598, as LlamaGen (arXiv:2406.06525) applies it to
    logits. The scale broadcasts.
    """
    return unconditional + scale * (conditional - unconditional)


def guidance_at(
    scale: float, num_steps: int, schedule: Literal["constant", "linear", "cosine"]
) -> Tensor:
    """The guidance scale of every step of a draw, [num_steps]: from 1 at the first to `scale`.

    "linear" is VAR's ramp (arXiv:2404.02905), also MAR's and BitDance's; "cosine" rises as
    (1 - cos(pi k / (K - 1))) / 2; "constant" is `scale` throughout.
    """
    if schedule == "constant" or num_steps == 1:
        return torch.full((num_steps,), float(scale))
    share = torch.linspace(0, 1, num_steps)
    if schedule == "cosine":
        share = (1 - torch.cos(math.pi * share)) / 2
    return 1 + (scale - 1) * share


def inverse_cdf(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """The token at which the distribution function of softmax(logits / temperature) passes u.

    Args:
        logits: [..., V]; a token of logit -inf is never drawn.
        uniform: float32 [...], in [0, 1), of 24 bits as `flowrl.data.noise` draws them.
        temperature: positive.

    Returns:
        int64 [...].
    """
    cdf = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    # The total is only about 1. As u <= 1 - 2^-24, the level rounds to below it, also in float32.
    level = uniform[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, level, right=True).squeeze(-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, but is {temperature}.")
    return torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)
