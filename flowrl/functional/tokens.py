"""Discrete decisions: log-probability and entropy of tokens under logits.

The counterpart of `sde` for autoregressive policies. Both take the temperature that the sampler
used: a log-prob at another temperature belongs to another policy. float32 at least, whatever the
model's dtype.
"""

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


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, but is {temperature}.")
    return torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)
