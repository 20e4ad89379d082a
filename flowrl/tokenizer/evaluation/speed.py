"""How fast a tokenizer is and what it takes: time, network evaluations, parameters, memory.

Times are of this machine and the only numbers of a record that differ between two runs.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_vis.tokenizer import VisualTokenizer

_REPEATS = 3


@torch.no_grad()
def speed(tokenizer: VisualTokenizer, images: Tensor) -> dict[str, Any]:
    """Encoding and decoding of one batch of images in [0, 1], with all tokens.

    Returns:
        batch_size, threads, device; parameters, and those of them that are trained;
        encode and decode, each images_per_s, tokens_per_s (median of three, after one to warm up),
        evaluations (calls of the part of the tokenizer that is called most often: of a generative
        decoder one per step, two with guidance) and peak_mb: memory beyond weights and inputs.
        decode is None where there is no decoder.
    """
    tokens = tokenizer.encode(images)
    num_tokens = int(tokens.length.sum())
    result: dict[str, Any] = {
        "batch_size": len(images),
        "threads": torch.get_num_threads(),
        "device": str(images.device),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "trained_parameters": sum(p.numel() for p in tokenizer.parameters() if p.requires_grad),
        "encode": _measured(lambda: tokenizer.encode(images), tokenizer, images, num_tokens),
        "decode": None,
    }
    if tokenizer.is_decodable:
        result["decode"] = _measured(
            lambda: tokenizer.decode(tokens), tokenizer, images, num_tokens
        )
    return result


def _measured(
    call: Callable[[], Any], tokenizer: nn.Module, images: Tensor, num_tokens: int
) -> dict[str, float]:
    evaluations = count_calls(call, tokenizer)  # warms up, too
    seconds = []
    for _ in range(_REPEATS):
        _wait(images.device)
        started = time.perf_counter()
        call()
        _wait(images.device)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "images_per_s": len(images) / median,
        "tokens_per_s": num_tokens / median,
        "evaluations": evaluations,
        "peak_mb": peak_bytes(call, images.device) / 1e6,
    }


def count_calls(call: Callable[[], Any], module: nn.Module) -> int:
    """How often the most often called part of a module, or part of a part, runs during a call."""
    parts = {name: part for name, part in module.named_modules() if name and name.count(".") < 2}
    counts = dict.fromkeys(parts, 0)

    def counting(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[name] += 1

        return count

    hooks = [part.register_forward_hook(counting(name)) for name, part in parts.items()]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return max(counts.values(), default=0)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most memory that a call holds at a time, beyond what was held before.

    On a CPU it is counted from the allocator's events, so it is the same every time.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events: Any = profile.kineto_results
    memory = sorted(
        (each.start_ns(), each.nbytes()) for each in events.events() if each.name() == "[memory]"
    )
    return max(itertools.accumulate(size for _, size in memory), default=0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
