"""Everything is computed where the tokenizer is: on a CUDA device without one, by fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from tests.tokenizers.test_contract import TINY, samples, tiny
from tokenizers_vis.tokens import Tokens

# Whose training forward depends on numbers that a fake tensor has not: codes are counted and placed
# anew, or images of a batch told apart by their number of tokens.
COUNTS = {
    "grid vq", "titok", "titok nested", "hita", "tokenflow", "tokenflow pixels", "tokenflex",
    "flextok released",
}  # fmt: skip
# A part that repeats by a tensor of lengths, in its decoder.
PACKS = {"flextok released"}


def moved(tokenizer):
    """With fake weights on a device that is not there."""
    for module in tokenizer.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake, value.requires_grad)
        if "initted" in module._buffers:  # the library asks it for its value
            del module._buffers["initted"]
            module.initted = True
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return tokenizer


def where(found):
    """The devices of the tensors of tokens, or of one."""
    if not isinstance(found, Tokens):
        return {found.device.type}
    parts = (found.embeddings, found.mask, found.ids, found.features)
    return {part.device.type for part in parts if part is not None}


@pytest.mark.parametrize("case", TINY)
def test_all_of_it_is_on_the_tokenizers_device(case):
    """Mutation: a buffer that is no buffer, a mask or noise made on the CPU."""
    tokenizer = tiny(case).eval()
    shape = samples(tokenizer).shape
    with FakeTensorMode():
        moved(tokenizer)
        images = torch.rand(shape, device="cuda")
        tokens = tokenizer.encode(images)
        assert where(tokens) == {"cuda"}
        assert (
            where(tokens.keep(1)) == where(tokens.keep(torch.ones(len(images)).long())) == {"cuda"}
        )
        if tokenizer.is_decodable and case not in PACKS:
            assert where(tokenizer.decode(tokens)) == {"cuda"}
        counts = torch.full((len(images),), tokenizer.token_counts[-1], device="cuda")
        try:
            output = tokenizer.train()(images, progress=0.5, num_tokens=counts)
        except (DataDependentOutputException, DynamicOutputShapeException):
            assert case in COUNTS
            return
        assert case not in COUNTS
        assert where(output.tokens) == where(output.loss) == {"cuda"}
