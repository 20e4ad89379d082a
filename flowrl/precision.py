"""What `mixed_precision: auto` stands for on the machine at hand."""

from __future__ import annotations

import torch

# What processors that multiply bfloat16 natively say of themselves; others emulate it, slowly.
_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def resolve_precision(name: str) -> str:
    """Accelerate's `mixed_precision`: `name`, or for "auto" bf16 where that is native, else no."""
    if name != "auto":
        return name
    return "bf16" if _has_native_bfloat16() else "no"


def _has_native_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not in every version of torch; without it the answer is no, which is always right, if slower.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in _NATIVE_BFLOAT16)
