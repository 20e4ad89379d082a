"""A run's folder as flowrl leaves it, made without training: curves and pictures are drawn.

`PYTHONPATH=. python tests/train_effects/conftest.py FOLDER` writes one and its report, to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from flowrl.config import dump_config, load_config

SKILLS = (
    "single_object", "two_object", "counting", "colors", "position", "color_attr",
)  # fmt: skip
COLORS = {"red": (214, 60, 50), "blue": (50, 92, 214), "green": (40, 160, 80)}
SHAPES = ("circle", "square", "triangle")

CONFIG = """\
run: {name: quickstart, steps: %(steps)d, max_minutes: 6.0}
model: {id: shapes, max_sequence_length: 12}
method: {name: mix_grpo, args: {num_steps: 10, window: 4}}
data: {train: shapes/train, num_groups: 12, group_size: 12}
rewards: [{name: shapes_strict}]
optim: {lr: 1.0e-4}
compute: {micro_batch_size: 48, rollout_batch_size: 144, decode_batch_size: 144}
eval: {every: 25, num_steps: 10}
checkpoint: {every: 25}
"""
METHOD = {
    "name": "mix_grpo",
    "paper": "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE, arXiv:2507.21802",
    "rows": [
        ["method", "mix_grpo"],
        ["paper", "MixGRPO"],
        ["num_steps", "10"],
        ["window", "4, moves by 1 every 25 steps (progressive, constant)"],
        ["kernel", "flow_sde, noise_level 0.7"],
        ["advantage", "group mean, group std, eps 1e-4"],
        ["surrogate", "ppo_clip, clip_range 1e-4, adv_clip_max 5"],
        ["kl_coef", "0"],
    ],
}
ENV = {"flowrl": "0.1.0", "commit": "1a2b3c4d5e6f", "python": "3.11.2", "torch": "2.11.0",
       "diffusers": "0.42.0", "platform": "Linux-6.1", "device": "cpu"}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run of six steps."""
    return make_run(tmp_path / "run", steps=6, eval_every=3)


def make_run(folder: Path, *, steps: int = 100, eval_every: int = 25, seed: int = 0) -> Path:
    """Write the folder of a finished run of so many steps."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG % {"steps": steps})
    dump_config(load_config(folder / "config.yaml"), folder / "config.yaml")
    (folder / "method.json").write_text(json.dumps(METHOD))
    (folder / "env.json").write_text(json.dumps(ENV))
    status = {"state": "finished", "step": steps, "minutes": 5.63, "reason": ""}
    (folder / "status.json").write_text(json.dumps(status))
    random_ = random.Random(seed)
    rows = []
    for step in range(steps + 1):
        at = 1_790_000_000 + 3.4 * step
        if step:
            rows.append({"step": step, "time": at, **_metrics(step, steps, random_)})
        if step % eval_every == 0 or step == steps:
            result = _evaluation(folder / "eval", step, steps)
            scores = {f"eval/skill/{tag}": value for tag, value in result["skills"].items()}
            rows.append({"step": step, "time": at, "eval/score": result["score"], **scores,
                         "eval/diversity": result["diversity"]})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checkpoints" / f"step_{steps:06d}").mkdir(parents=True)
    pipeline = folder / "final" / "pipeline"
    pipeline.mkdir(parents=True)
    (pipeline / "model.safetensors").write_bytes(bytes(120_000))
    return folder


def _metrics(step, steps, random_):
    done = 1 - math.exp(-3 * step / steps)
    noise = random_.gauss(0, 0.025)
    mean = 0.42 + 0.42 * done + noise
    return {
        "train/loss": random_.gauss(0, 0.01),
        "train/reward_mean": mean,
        "train/reward_std": math.sqrt(mean * (1 - mean)),
        "reward/shapes_strict/mean": mean,
        "reward/shapes_strict/std": math.sqrt(mean * (1 - mean)),
        "train/ratio_mean": 1 + random_.gauss(0, 1e-4),
        "train/ratio_max_dev": 10 ** random_.gauss(-2.4, 0.2),
        "train/clip_frac_high": abs(random_.gauss(0.06, 0.02)),
        "train/clip_frac_low": abs(random_.gauss(0.04, 0.02)),
        "train/approx_kl": abs(random_.gauss(2e-6, 1e-6)),
        "train/zero_std_frac": min(1, abs(random_.gauss(0.1 + 0.4 * done, 0.08))),
        "train/invalid_frac": 0.0,
        "train/grad_norm": abs(random_.gauss(0.5, 0.15)) if step != 30 else None,
        "train/lr": 1e-4,
        "train/window_start": min(6, step // 15),
        "perf/step_time_s": 3.3 + random_.random() * 0.3,
        "perf/rollout_s": 1.1 + random_.random() * 0.1,
        "perf/decode_s": 0.38,
        "perf/reward_wait_s": 0.2,
        "perf/train_s": 1.5 + random_.random() * 0.1,
        "perf/images_per_s": 144 / 3.4,
        "perf/nfe_per_image": 9.2 + min(6, step // 15) * -0.4,
        "perf/train_rows_per_image": 3.1,
        "perf/max_memory_gb": 1.2 + step / 1000,
    }


def _evaluation(folder, step, steps):
    done = 1 - math.exp(-3 * step / steps)
    name = f"step_{step:06d}"
    (folder / name).mkdir(parents=True)
    skills = {
        tag: min(0.99, 0.85 - 0.09 * i + done * (0.12 + 0.07 * i)) for i, tag in enumerate(SKILLS)
    }
    samples = []
    for index in range(8):
        color, shape = list(COLORS)[index % 3], SHAPES[index // 3]
        is_right = index % 4 == 0 or step > 10 * index
        drawn = color if is_right else list(COLORS)[(index + 1) % 3]
        _picture(COLORS[drawn], shape, index).save(folder / name / f"{index:03d}.png")
        samples.append({"prompt": f"a photo of a {color} {shape}", "tag": SKILLS[index % 6],
                        "seed": 1234, "rewards": {"shapes_strict": float(is_right)},
                        "file": f"{name}/{index:03d}.png"})  # fmt: skip
    score = sum(skills.values()) / len(skills)
    result = {"step": step, "score": score, "skills": skills, "rewards": {"shapes_strict": score},
              "diversity": 0.21 - 0.03 * done, "num_samples": 240, "num_steps": 10,
              "guidance_scale": 1.0, "seed": 1234, "weights": "current",
              "samples": samples}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(result))
    return result


def _picture(color, shape, seed, size=64):
    large = Image.new("RGB", (4 * size, 4 * size), (236, 233, 226))
    draw, at = ImageDraw.Draw(large), random.Random(seed)
    x, y, r = at.randint(70, 180), at.randint(70, 180), at.randint(38, 64)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=color)
    else:
        draw.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=color)
    return large.resize((size, size), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    from flowrl.train.report import make_report

    print(make_report(make_run(Path(sys.argv[1]))))
