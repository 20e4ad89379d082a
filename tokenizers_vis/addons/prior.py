"""LARP's learned prior: a small autoregressive model that shapes the tokens while they are learned.

Paper: LARP, arXiv:2410.21264, sections 3.3 and 3.4; scheduled sampling for transformers,
arXiv:1906.07651. Reading order: `ARPrior.forward`, `mixed_inputs`, `code_logits`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.blocks import Transformer, causal_mask
from tokenizers_vis.quantizers.base import LossTerm, in_full_precision, masked_mean
from tokenizers_vis.quantizers.stochastic import draw_ids
from tokenizers_vis.tokenizer import TokenizerOutput, VisualTokenizer


class ARPrior(AddOn):
    """Predicts every token but the first from the embeddings of those before, in two rounds.

    Any tokenizer of one codebook of ids can have it. Its gradient reaches the encoder only through
    the embeddings that the prior reads (straight-through); the codebook is detached. The loss is
    no perplexity: with unit codes and temperature 1 even a perfect prediction of one of 8192 codes
    costs 8.04 nats, because cosines lie in [-1, 1]; measure with a probe.

    Differs: no dropout (it would draw from the global generator; in the authors' code it stays on
    in evaluation). Which inputs of the second round are its own guesses is drawn for each token.

    Args:
        dim, depth, num_heads: of the prior; the paper's has 384, 12 and 6.
        weight: of its loss; the paper's is beside a perceptual and an adversarial loss. Without
            them 0.06 bought its bits by worse images and fewer codes (one seed, 2,500 steps, 8
            tokens of 256 codes: error .123 for .087, entropy 4.6 bits for 6.4).
        temperature: of the predicted codes.
        mix: share of own guesses in the second round, at most.
        mix_until: progress until which that share rises, linearly from 0.
    """

    _embed: Callable[[Tensor], Tensor]

    def __init__(
        self,
        *,
        dim: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        weight: float = 0.06,
        temperature: float = 1.0,
        mix: float = 0.5,
        mix_until: float = 0.3,
    ) -> None:
        super().__init__()
        if not 0 <= mix <= 1 or not 0 <= mix_until <= 1 or temperature <= 0:
            raise ValueError(
                "mix and mix_until must lie in [0, 1] and temperature above 0, got "
                f"{mix}, {mix_until} and {temperature}"
            )
        self.weight, self.temperature = weight, temperature
        self.mix, self.mix_until = mix, mix_until
        self.dim = dim
        self.trunk = Transformer(dim, depth, num_heads=num_heads)

    def attach(self, tokenizer: VisualTokenizer) -> None:
        codebook, length = tokenizer.codebooks[0], tokenizer.layout.num_tokens
        if len(tokenizer.codebooks) > 1 or codebook.vocab is None or codebook.groups > 1:
            raise ValueError(
                f"a prior needs one codebook of single ids; {tokenizer.name} has "
                f"{list(tokenizer.codebooks)}"
            )
        if length < 2:
            raise ValueError(f"a prior needs two tokens or more, {tokenizer.name} has {length}")
        self.vocab = codebook.vocab
        # A bound method: the tokenizer must not become a part of its own add-on.
        self._embed = tokenizer.embed
        device = next(tokenizer.parameters()).device
        norms = self.table(device).norm(dim=-1)
        self.is_unit = bool(((norms - 1).abs() < 1e-3).all())
        self.token_in = nn.Linear(codebook.dim, self.dim)
        self.places = nn.Parameter(0.02 * torch.randn(length - 1, self.dim))
        self.code_out = nn.Linear(self.dim, codebook.dim)
        self.to(device)

    def forward(
        self,
        images: Tensor,
        output: TokenizerOutput,
        *,
        progress: float,
        generator: torch.Generator | None,
    ) -> dict[str, LossTerm]:
        tokens = output.tokens
        if tokens.ids is None:
            raise ValueError("a prior predicts ids, and these tokens have none")
        table = self.table(tokens.ids.device)
        inputs = tokens.embeddings[:, :-1].float()
        first = self.logits(inputs, table)
        guess = draw_ids(torch.softmax(first.detach(), dim=-1), generator)
        drawn = torch.rand(guess.shape, generator=generator).to(guess.device)
        second = self.logits(
            mixed_inputs(inputs, table[guess], drawn < self.mix_ratio(progress)), table
        )
        target, counts = tokens.ids[:, 1:], tokens.mask[:, 1:]
        rounds = [
            F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            for logits in (first, second)
        ]
        return {"prior": LossTerm(self.weight, masked_mean((rounds[0] + rounds[1]) / 2, counts))}

    def logits(self, inputs: Tensor, table: Tensor) -> Tensor:
        """[B, L - 1, V] of tokens 2 to L, from the embeddings [B, L - 1, C] of 1 to L - 1."""
        x = self.token_in(inputs) + self.places
        x = self.trunk(x, mask=causal_mask(x.shape[1], device=x.device))
        predicted = self.code_out(x).float()
        with in_full_precision(predicted):
            return code_logits(predicted, table, self.temperature, unit=self.is_unit)

    def table(self, device: torch.device) -> Tensor:
        """The tokenizer's codes [V, C] as they are now, detached."""
        ids = torch.arange(self.vocab, device=device)
        return self._embed(ids[None])[0].detach().float()

    def mix_ratio(self, progress: float) -> float:
        """Share of own guesses in the second round, at this progress of the training."""
        risen = 1.0 if progress >= self.mix_until else progress / self.mix_until
        return self.mix * risen


def mixed_inputs(inputs: Tensor, guess: Tensor, is_own: Tensor) -> Tensor:
    """What the second round reads: true embeddings, some replaced by the first round's guesses.

    Args:
        inputs: [B, L - 1, C], of tokens 1 to L - 1.
        guess: [B, L - 1, C], of tokens 2 to L: one place ahead of the inputs.
        is_own: bool [B, L - 1], whether a guess is used.

    Returns:
        [B, L - 1, C]. The first token is never guessed; the last token's guess is never read.
    """
    later = torch.where(is_own[:, :-1, None], guess[:, :-1], inputs[:, 1:])
    return torch.cat([inputs[:, :1], later], dim=1)


def code_logits(predicted: Tensor, table: Tensor, temperature: float, *, unit: bool) -> Tensor:
    """[..., V] of predicted vectors [..., C] against codes [V, C].

    Unit codes: cosine / temperature (LARP). Other tables (a lattice has codes of one direction and
    several lengths, which no cosine tells apart): minus half the squared distance / temperature,
    which is the same for unit vectors up to a constant.
    """
    if unit:
        return F.normalize(predicted, dim=-1) @ table.T / temperature
    distance = predicted.square().sum(-1, keepdim=True) - 2 * predicted @ table.T
    return -(distance + table.square().sum(-1)) / (2 * temperature)
