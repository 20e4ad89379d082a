"""Rewards: images and prompts in, one score per sample out. Never imports flowrl.

`rewards.load("shapes_strict")` gives an object with `score(*, images, prompts, metadata)`; see
`rewards.base` for the protocol and `rewards.registry` for the names.
"""

from rewards.registry import NAMES, load

__all__ = ["NAMES", "load"]
