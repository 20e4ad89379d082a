"""LARP: a clip as a few holistic tokens, made easy for the autoregressive model that comes after.

Paper: LARP, arXiv:2410.21264. Queries gather the clip, a stochastic VQ makes them ids, a
transformer draws the clip from them. The learned prior, which gives the paper its name, is the
add-on `addons.prior.ARPrior`: it is trained with the tokenizer and thrown away afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers_vis.holistic import HolisticConfig, HolisticTokenizer, Patches
from tokenizers_vis.quantizers.stochastic import StochasticVq


@dataclass(frozen=True)
class LarpConfig(HolisticConfig):
    """The numbers of a LARP; the paper's in brackets: 16 frames of 128 x 128, 1,024 tokens.

    Attributes:
        num_frames: of a clip [16]; None = it takes images.
        patch_frames: of a patch [4, of 8 x 8 pixels].
        temperature: of the choice of a code in training [0.03].
        vq: weight of the quantiser's losses [0.1].
        vocab, code_dim: [8192, 16].
        dim, num_heads, encoder_depth, decoder_depth: [768, 12, 12, 12].
    """

    num_frames: int | None = None
    patch_frames: int = 1
    temperature: float = 0.03
    vq: float = 0.1


class Larp(HolisticTokenizer):
    """LARP without its prior, which is an add-on. See the module.

    Encoding takes the likeliest code unless `sample` is asked for; the authors' code samples in
    evaluation, too. Differs: gated MLPs and normalised queries and keys of our block. The
    perceptual (1.0) and adversarial (0.3) losses are add-ons.
    """

    Config = LarpConfig
    name = "larp"

    def __init__(self, config: LarpConfig) -> None:
        still = (3, config.image_size, config.image_size)
        shape = still if config.num_frames is None else (config.num_frames, *still)
        super().__init__(
            config,
            quantizer=StochasticVq(
                config.dim,
                config.vocab,
                dim=config.code_dim,
                temperature=config.temperature,
                commitment=0.25 * config.vq,
                codebook=config.vq,
            ),
            patches=Patches(shape, config.patch_size, config.patch_frames),
        )
