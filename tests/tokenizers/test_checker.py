"""`check_tokenizer` catches a breach of each of its rules."""

import dataclasses

import pytest
import torch

from flowrl.testing import check_tokenizer
from tests.tokenizers.test_contract import samples, tiny
from tokenizers_vis.flextok import FlexTok
from tokenizers_vis.grid import GridTokenizer
from tokenizers_vis.hieratok import HieraTok


def broken(base, **members):
    """A tiny tokenizer of a class that has some members replaced."""
    case = {GridTokenizer: "grid vq", FlexTok: "flextok pixels", HieraTok: "hieratok"}[base]
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


def rounds_up(self, images, num_tokens=None, *, sample=False, generator=None):
    known = [count for count in self.token_counts if num_tokens and count >= num_tokens]
    count = known[0] if known else num_tokens
    return HieraTok.encode(self, images, count, sample=sample, generator=generator)


def learns_in_training(self, images, num_tokens, *, sample, generator):
    return GridTokenizer._encode(self, images, num_tokens, sample=True, generator=generator)


def stops_the_gradient(self, images, *, progress=0.0, num_tokens=None, generator=None):
    output = GridTokenizer.forward(self, images, progress=progress, generator=generator)
    cut = dataclasses.replace(output.tokens, embeddings=output.tokens.embeddings.detach())
    return dataclasses.replace(output, tokens=cut)


def halves_under_autocast(self, images, num_tokens, *, sample, generator):
    found = GridTokenizer._encode(self, images, num_tokens, sample=sample, generator=generator)
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
    return dataclasses.replace(found, embeddings=found.embeddings.to(dtype))


def forgets_the_length(self, ids, length=None):
    return FlexTok.tokens_from_ids(self, ids)


def draws_otherwise(self, tokens, *, solver, generator):
    return 1 - GridTokenizer._decode(self, tokens, solver=solver, generator=generator)


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
    "a count that it has not is rounded": (HieraTok, {"encode": rounds_up}, "num_tokens=2"),
    "encoding moves the table in training": (
        GridTokenizer,
        {"_encode": learns_in_training},
        "in training mode",
    ),
    "tokens stop the gradient": (
        GridTokenizer,
        {"forward": stops_the_gradient},
        "embeddings in training",
    ),
    "embeddings are bfloat16 under autocast": (
        GridTokenizer,
        {"_encode": halves_under_autocast},
        "under autocast",
    ),
    "a length is ignored": (FlexTok, {"tokens_from_ids": forgets_the_length}, "their length"),
    # The name in the file is that of the plain class, which decodes otherwise.
    "a loaded one draws otherwise": (
        GridTokenizer,
        {"_decode": draws_otherwise},
        "decoded images.*saved and loaded",
    ),
    "dropout is ignored": (FlexTok, {"forward": keeps_all_in_training}, "kept in training"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_each_breach_is_caught(breach):
    base, members, message = BREACHES[breach]
    tokenizer = broken(base, **members)
    with pytest.raises(AssertionError, match=message):
        check_tokenizer(tokenizer, samples(tokenizer))
