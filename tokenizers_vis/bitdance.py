"""BitDance's tokenizer: plain convolutions and grouped signs, 32 to 256 bits a token.

Paper: BitDance, arXiv:2602.14041. The head that draws such tokens is in `bit_head`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenizers_vis.uniwetok import UniWeTok, UniWeTokConfig


@dataclass(frozen=True)
class BitDanceConfig(UniWeTokConfig):
    """What BitDance's tokenizer has otherwise than `UniWeTokConfig` says; [?] = not published.

    Attributes:
        attention_depth: none [0].
        bound: features stay unbounded ["none"], and a commitment holds them.
        entropy, commitment: [?]; the commitment that MAGVIT-2's author advises beside an entropy.
        temperature: [0.01], where the entropy's gradient lives only within 0.01 of zero; at this
            size, 1 keeps it alive everywhere.
        use_noise: [false, but for its variant that is trained against an adversary].
    """

    attention_depth: int = 0
    bound: Literal["siglu", "none"] = "none"
    commitment: float = 0.1
    use_noise: bool = False


class BitDance(UniWeTok):
    """BitDance's tokenizer, arXiv:2602.14041: the body of UniWeTok with other numbers.

    That is not a shortcut: in the authors' code the one is the other with attention, SigLu and
    noise added, and the same adaptive group norms. Differs as `UniWeTok` does; the published one
    trains with perceptual and adversarial losses, which are add-ons here.
    """

    Config = BitDanceConfig
    name = "bitdance"
