"""What a training forward does and encoding does not: tables move, tokens are drawn."""

import pytest
import torch

from tests.tokenizers.test_contract import samples, tiny


def counts_of(tokenizer):
    """How often codes were chosen, table by table."""
    state = tokenizer.state_dict().items()
    return {name: value.clone() for name, value in state if name.endswith(("cluster_size", "used"))}


@pytest.mark.parametrize(
    ("case", "tables"), [("grid vq", 1), ("titok", 1), ("hita", 2), ("tokenflow", 1)]
)
def test_every_table_moves(case, tables):
    """Mutation: the forward quantises as encoding does, without `sample`."""
    tokenizer = tiny(case).train()
    before = counts_of(tokenizer)
    assert len(before) == tables
    tokenizer(samples(tokenizer), progress=1.0, generator=torch.Generator().manual_seed(0))
    for name, value in counts_of(tokenizer).items():
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("case", ["larp images", "larp clips", "grid kl", "hieratok"])
def test_tokens_are_drawn(case):
    """By the generator that is given. Mutation: the likeliest code, or the mean."""
    tokenizer = tiny(case).train()
    if case.startswith("larp"):
        tokenizer.quantizer.temperature = 1.0  # at .03 a tiny table has but one near code
    images = samples(tokenizer)

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return tokenizer(images, generator=generator).tokens.embeddings

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


def test_attention_stands_in_the_encoder_and_in_the_decoder():
    """UniWeTok's hybrid. Mutation: one of the two goes round its attention."""
    tokenizer = tiny("uniwetok").train()
    tokenizer(samples(tokenizer), generator=torch.Generator().manual_seed(0)).loss.backward()
    for part in (tokenizer.encoder, tokenizer.decoder):
        parameters = dict(part.attention.named_parameters())
        assert "registers" in parameters
        without = [n for n, p in parameters.items() if p.grad is None or not p.grad.any()]
        assert not without
