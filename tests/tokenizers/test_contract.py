"""Every tokenizer keeps the contract; the checker is shown to catch a breach of each rule."""

import pytest
import torch

from flowrl.testing import check_tokenizer
from tests.tokenizers.published import CASES as PUBLISHED
from tokenizers_vis.registry import make_tokenizer

# A tiny one of every kind: name in the registry, arguments.
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 1.1,
    "shift_factor": 0.1,
}
SMALL = {"image_size": 16, "channels": (8, 16)}
FLEXTOK = {
    "image_size": 16, "patch_size": 4, "num_registers": 4, "dim": 32, "num_heads": 2,
    "encoder_depth": 1, "decoder_depth": 2,
}  # fmt: skip
HOLISTIC = {
    "image_size": 16, "patch_size": 8, "num_tokens": 4, "vocab": 32, "code_dim": 4, "dim": 32,
    "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1,
}  # fmt: skip
HIERATOK = {
    "image_size": 16, "patch_size": 4, "scales": (1, 2, 4), "latent_dim": 4, "dim": 32,
    "num_heads": 2, "encoder_depth": 1, "scale_depth": 1, "decoder_depth": 1,
}  # fmt: skip
TOKENFLOW = {
    **SMALL, "scales": (1, 2, 4), "vocab": 32, "semantic_dim": 8, "pixel_dim": 4, "dim": 32,
    "num_heads": 2, "semantic_depth": 1, "decoder_depth": 1, "teacher_dim": 8,
}  # fmt: skip
HITA = {
    **SMALL, "num_slots": 4, "shift": 2, "slot_vocab": 16, "patch_vocab": 32, "dim": 4,
    "width": 32, "num_heads": 2, "full_depth": 1, "causal_depth": 1, "fusion_depth": 1,
}  # fmt: skip
TOKENFLEX = {
    "image_size": 16, "patch_size": 4, "dim": 16, "width": 32, "num_heads": 2, "hidden": 32,
    "depth": 1, "reader_depth": 1,
}  # fmt: skip
TINY = {
    "grid vq": ("grid", {**SMALL, "vocab": 32}),
    "grid fsq": ("grid", {**SMALL, "quantizer": "fsq", "levels": (4, 4)}),
    "grid lfq": ("grid", {**SMALL, "quantizer": "lfq", "num_bits": 8, "group_bits": 4}),
    "grid binary": ("grid", {**SMALL, "quantizer": "binary", "num_bits": 8, "group_bits": 4}),
    "grid kl": ("grid", {**SMALL, "quantizer": "kl", "dim": 4}),
    "flextok pixels": ("flextok", FLEXTOK),
    "flextok latents": ("flextok", {**FLEXTOK, "patch_size": 2, "autoencoder": VAE}),
    "hieratok": ("hieratok", HIERATOK),
    "hieratok one scale": ("hieratok", {**HIERATOK, "scales": (4,)}),
    "tokenflow": ("tokenflow", TOKENFLOW),
    "tokenflow pixels": ("tokenflow", {**TOKENFLOW, "semantic_dim": 0}),
    "larp images": ("larp", HOLISTIC),
    "larp clips": ("larp", {**HOLISTIC, "num_frames": 4, "patch_frames": 2}),
    "titok": ("titok", HOLISTIC),
    "titok nested": ("titok", {**HOLISTIC, "nested": True}),
    "hita": ("hita", HITA),
    "tokenflex": ("tokenflex", TOKENFLEX),
    "uniwetok": ("uniwetok", {**SMALL, "num_heads": 2, "num_bits": 8, "group_bits": 4}),
    "grid lfq of one group": (
        "grid",
        {**SMALL, "quantizer": "lfq", "num_bits": 4, "group_bits": 4},
    ),
    "bitdance of one group": ("bitdance", {**SMALL, "num_bits": 4, "group_bits": 4}),
    "bitdance": ("bitdance", {**SMALL, "num_bits": 8, "group_bits": 4}),
    **PUBLISHED,
}


def tiny(case):
    torch.manual_seed(0)
    name, args = TINY[case]
    return make_tokenizer(name, args)


def samples(tokenizer, num=3):
    return torch.rand(num, *tokenizer.sample_shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", TINY)
def test_the_contract_is_kept(case):
    tokenizer = tiny(case)
    check_tokenizer(tokenizer, samples(tokenizer))
