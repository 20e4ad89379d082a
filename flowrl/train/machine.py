"""What a run asks of its process and its device: peak memory, and an orderly exit."""

from __future__ import annotations

import sys
import time

import torch
from accelerate import Accelerator


def end_training(accelerator: Accelerator) -> None:
    """Closes trackers and the process group, so that the process may exit.

    The threads of gloo free the tensors of their last collective under Python's lock, and Python
    aborts a process that exits while they wait for it (seen with torch 2.15, one exit in twenty).
    """
    accelerator.end_training()
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        time.sleep(0.2)  # lets go of the lock


def max_memory_gb(device: torch.device) -> float:
    """Peak memory so far, GB: of the accelerator, or of this process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
