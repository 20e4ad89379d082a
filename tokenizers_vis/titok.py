"""TiTok: the fixed one-dimensional baseline, an image as 32 tokens or so.

Paper: TiTok, arXiv:2406.07550. Latent tokens in a ViT encoder, VQ, and a ViT decoder of mask
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers_vis.holistic import HolisticConfig, HolisticTokenizer, Patches
from tokenizers_vis.quantizers.library import Vq


@dataclass(frozen=True)
class TiTokConfig(HolisticConfig):
    """The numbers of a TiTok; the paper's in brackets: 256 pixels, patches of 16, 32 to 128 tokens.

    Attributes:
        vocab, code_dim: [4096, 12].
        commitment: weight of |features - code|^2 [0.25].
    """

    pixel_l1: float = 0.0
    pixel_l2: float = 1.0
    commitment: float = 0.25


class TiTok(HolisticTokenizer):
    """Latent tokens, VQ, mask tokens. See the module.

    Differs: one stage on pixels. The paper first predicts the codes of a pretrained MaskGIT-VQGAN
    (its proxy codes) and then tunes the decoder on pixels, and needs that model's weights; it
    learns all places, which are fixed sinusoids here; its table learns by gradient, ours by
    averages. Perceptual and adversarial losses are add-ons.
    """

    Config = TiTokConfig
    name = "titok"

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(
            config,
            quantizer=Vq(
                config.dim, config.vocab, dim=config.code_dim, commitment=config.commitment
            ),
            patches=Patches((3, config.image_size, config.image_size), config.patch_size),
        )
