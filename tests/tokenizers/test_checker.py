"""`check_tokenizer` catches a breach of each of its rules."""

import dataclasses

import pytest
import torch

from flowrl.testing import check_tokenizer
from tests.tokenizers.test_contract import samples, tiny
from tokenizers_vis.flextok import FlexTok
from tokenizers_vis.grid import GridTokenizer


def broken(base, **members):
    """A tiny tokenizer of a class that has some members replaced."""
    case = {GridTokenizer: "grid vq", FlexTok: "flextok pixels"}[base]
    tokenizer = tiny(case)
    tokenizer.__class__ = type(f"Broken{base.__name__}", (base,), members)
    return tokenizer


def draws(self, images, num_tokens, *, sample, generator):
    return GridTokenizer._encode(self, images + 0.01 * torch.rand(1), num_tokens, sample=sample,
                                 generator=generator)  # fmt: skip


def learns(self, images, num_tokens, *, sample, generator):
    self.encoder.layers[0].bias.data += 1e-3
    return GridTokenizer._encode(self, images, num_tokens, sample=sample, generator=generator)


def mixes(self, images, num_tokens, *, sample, generator):
    mixed = (images + images.flip(0)) / 2 if len(images) > 1 else images
    return GridTokenizer._encode(self, mixed, num_tokens, sample=sample, generator=generator)


def halves(self, images, num_tokens, *, sample, generator):
    found = GridTokenizer._encode(self, images, num_tokens, sample=sample, generator=generator)
    return dataclasses.replace(found, embeddings=found.embeddings.double())


def shifted(self, ids):
    return self.quantizer.embed((ids + 1) % 32)


def keeps_all(self, images, num_tokens=None, *, sample=False, generator=None):
    return FlexTok.encode(self, images, None, sample=sample, generator=generator)


def looks_beyond(self, tokens, *, solver, generator):
    full = dataclasses.replace(tokens, mask=torch.ones_like(tokens.mask))
    return FlexTok._decode(self, full, solver=solver, generator=generator)


def forgets_the_seed(self, tokens, *, solver, generator):
    return FlexTok._decode(self, tokens, solver=solver, generator=torch.Generator().manual_seed(
        int(torch.randint(1000, ())))) + 0.1 * torch.rand(1)  # fmt: skip


def unclamped(self, tokens, *, solver=None, generator=None):
    return 2 * GridTokenizer.decode(self, tokens) - 0.5


def cut_off(self, images, *, progress=0.0, num_tokens=None, generator=None):
    output = GridTokenizer.forward(self, images, progress=progress, generator=generator)
    return dataclasses.replace(output, losses={
        name: term._replace(value=term.value.detach() + 0 * self.decoder.layers[0].bias.sum())
        for name, term in output.losses.items()})  # fmt: skip


def keeps_all_in_training(self, images, *, progress=0.0, num_tokens=None, generator=None):
    return FlexTok.forward(self, images, progress=progress, generator=generator)


BREACHES = {
    "encoding draws numbers": (GridTokenizer, {"_encode": draws}, "random state|called twice"),
    "encoding changes weights": (GridTokenizer, {"_encode": learns}, "after encode|called twice"),
    "images see their neighbours": (GridTokenizer, {"_encode": mixes}, "as in a batch"),
    "embeddings are float64": (GridTokenizer, {"_encode": halves}, "float32"),
    "ids mean something else": (GridTokenizer, {"embed": shifted}, "come from the ids"),
    "a count is ignored": (FlexTok, {"encode": keeps_all}, "encode"),
    "decoding looks beyond the mask": (FlexTok, {"_decode": looks_beyond}, "whatever the others"),
    "decoding draws its own noise": (FlexTok, {"_decode": forgets_the_seed}, "called twice"),
    "images leave their range": (GridTokenizer, {"decode": unclamped}, r"within \[0, 1\]"),
    "the encoder learns nothing": (GridTokenizer, {"forward": cut_off}, "gradient"),
    "dropout is ignored": (FlexTok, {"forward": keeps_all_in_training}, "kept in training"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_each_breach_is_caught(breach):
    base, members, message = BREACHES[breach]
    tokenizer = broken(base, **members)
    with pytest.raises(AssertionError, match=message):
        check_tokenizer(tokenizer, samples(tokenizer))
