"""A Stable Diffusion 3 with random weights, small enough to train and sample in a second."""

import textwrap
from pathlib import Path

from flowrl.build import build_parts, build_trainer, run_folder
from flowrl.commands.train import prepare_folder
from flowrl.config import load_config
from flowrl.make.shapes_model import build_pipeline, build_vae
from flowrl.train.loop import Trainer

CONFIG = """\
run: {{name: tiny, steps: 2, output_dir: "{folder}/runs"}}
model: {{id: "{folder}/base", max_sequence_length: 12, tuning: {tuning}}}
method: {{name: mix_grpo, args: {{num_steps: 4, window: 2, interval: 1}}}}
data: {{train: shapes/train, num_groups: 2, group_size: 4}}
rewards: [{{name: brightness}}]
optim: {{lr: 0.02}}
compute: {{micro_batch_size: 8, rollout_batch_size: 8, decode_batch_size: 8}}
eval: {{num_steps: 4, max_prompts: 3, samples_per_prompt: 2, num_samples_shown: 4}}
checkpoint: {{every: 0}}
"""


def save_base(folder: Path) -> Path:
    """A complete pipeline folder with random weights."""
    base = folder / "base"
    if not base.exists():
        build_pipeline(build_vae(), seed=0).save_pretrained(base)
    return base


def write_config(folder: Path, tuning: str, *, extra: str = "") -> Path:
    """A config beside its base model; `extra` is merged over it."""
    save_base(folder)
    base = folder / f"{tuning}.yaml"
    base.write_text(CONFIG.format(folder=folder, tuning=tuning))
    if not extra:
        return base
    path = folder / f"{tuning}_more.yaml"
    path.write_text(f"base: {base.name}\n{textwrap.dedent(extra)}")
    return path


def train(config: Path, *overrides: str) -> Trainer:
    """A finished run in `runs/tiny` beside the config."""
    loaded = load_config(config, overrides)
    parts = build_parts(loaded, where=config.name)
    prepare_folder(parts, run_folder(loaded))
    trainer = build_trainer(parts, run_folder(loaded))
    assert trainer.run() == "finished"
    return trainer
