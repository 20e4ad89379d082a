"""What the framework adds to the networks: a step's wall time over the time of its networks alone.

`python benchmarks/overhead.py [CONFIG] [key=value ...]` trains a few steps, then times the same
number of forwards, forward-backwards and decodes at the same batch sizes, with nothing around them,
in the same process. Both are medians; the phases are printed beside them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flowrl.build import Parts, build_parts, build_trainer, run_folder
from flowrl.commands.train import prepare_folder
from flowrl.config import load_config
from flowrl.train.track import read_metrics

STEPS, REPEATS = 8, 5


def main() -> None:
    """Prints the ratio and where the time goes."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "configs/quickstart.yaml")
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"run.output_dir={folder}", f"run.steps={STEPS}", "checkpoint.every=0",
                 "eval.every=0", "eval.max_prompts=2"]  # fmt: skip
        parts = build_parts(load_config(path, [*fixed, *sys.argv[2:]]), where=path.name)
        run = run_folder(parts.config)
        prepare_folder(parts, run)
        build_trainer(parts, run).run()
        rows = [r for r in read_metrics(run / "metrics.jsonl") if "perf/step_time_s" in r][2:]
    median = {k: statistics.median(r[k] for r in rows) for k in rows[0] if k.startswith("perf/")}
    samples = parts.config.data.num_groups * parts.config.data.group_size
    forwards = median["perf/nfe_per_image"] * samples
    trained = median["perf/train_rows_per_image"] * samples
    alone = time_alone(parts)
    network = forwards * alone["forward"] + trained * alone["forward-backward"]
    decode = samples * alone["decode"]
    step = median["perf/step_time_s"]
    print(f"\nstep {step:.3f} s, {samples} images, {torch.get_num_threads()} threads")
    print(f"transformer alone: {forwards:.0f} forwards x {1e3 * alone['forward']:.2f} ms + "
          f"{trained:.0f} forward-backwards x {1e3 * alone['forward-backward']:.2f} ms = "
          f"{network:.3f} s")  # fmt: skip
    print(f"decoder alone: {samples} images x {1e3 * alone['decode']:.2f} ms = {decode:.3f} s")
    for name in ("rollout", "decode", "reward", "train"):
        seconds = median[f"perf/{name}_s"]
        print(f"  {name:8} {seconds:7.3f} s  {100 * seconds / step:5.1f} %")
    inner = median["perf/rollout_s"] + median["perf/train_s"]
    print(f"rollout and training over the transformer alone: {inner / network:.3f}")
    print(f"step over transformer and decoder alone:         {step / (network + decode):.3f}")
    print(f"step over the transformer alone:                 {step / network:.3f}")


def time_alone(parts: Parts) -> dict[str, float]:
    """Seconds per row of a forward, a forward-backward and a decode, at the run's batch sizes."""
    config, policy = parts.config, parts.policy
    network = policy.weights.network

    def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        x_t = torch.randn(rows, *policy.pipeline.latent_shape, device=policy.device)
        texts = [parts.train_prompts[i % len(parts.train_prompts)].text for i in range(rows)]
        sigma = torch.rand(rows, device=policy.device)
        return x_t, sigma, policy._table.rows(texts, policy.device)

    def forward() -> None:
        with torch.no_grad():
            policy.pipeline.velocity(network, *free)

    def forward_backward() -> None:
        policy.pipeline.velocity(network, *trained).float().square().mean().backward()
        network.zero_grad()

    samples = config.data.num_groups * config.data.group_size
    free = inputs(min(config.compute.rollout_batch_size, samples))
    trained = inputs(config.compute.micro_batch_size)
    latents = free[0][: config.compute.decode_batch_size]
    return {
        "forward": seconds(forward) / len(free[0]),
        "forward-backward": seconds(forward_backward) / len(trained[0]),
        "decode": seconds(lambda: policy.pipeline.decode(latents)) / len(latents),
    }


def seconds(function: Callable[[], object]) -> float:
    """Median wall time of a call after a warm-up."""
    function()
    times = []
    for _ in range(REPEATS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
