"""Seeds derived from what a random number is for, so that no two purposes share one."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on all parts, their order and their types, and on nothing else.

    A hash, so that neighbouring steps and seeds are unrelated: (0, 1), (1, 0) and ("0", 1) all
    differ. It is the same on every machine and in every version of Python, numpy and torch.

    Args:
        parts: what the randomness is for, e.g. (run seed, "rollout", step).

    Returns:
        An integer in [0, 2^63), which fits int64 tensors, numpy and torch generators alike.
    """
    text = "\x00".join(f"{type(part).__name__}:{len(str(part))}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
