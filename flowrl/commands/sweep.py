"""`flowrl sweep FILE`: checks a sweep in W&B's format; with --local, runs it on this machine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from flowrl.config import Config
from flowrl.errors import ConfigError
from flowrl.sweep.spec import Sweep, check_metric, load_sweep


def run(
    *, file: Path, local: bool, jobs: int, trials: int | None, output: Path | None
) -> Sequence[str]:
    """Checks every value of a sweep, then runs it or says how W&B runs it.

    Args:
        file: the sweep's YAML file.
        local: run it here; else W&B's commands are printed.
        jobs: runs side by side.
        trials: runs in all; None = the file's run_cap, or the grid's.
        output: where a local sweep writes; None = runs/sweeps/NAME.

    Returns:
        The runs that failed, by name.

    Raises:
        ConfigError: something in the file would fail in a run.
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    sweep = load_sweep(file)
    configs = sweep.configs()  # before torch is loaded: a typo answers at once
    for config in configs:
        check(sweep, config)
    _say(f"{file}: {_describe(sweep)}; tried {len(configs)} configurations, all fit")
    if not local:
        if jobs != 1 or trials is not None or output is not None:
            raise ConfigError("--jobs, --trials and --output are for a sweep with --local")
        _print_commands(sweep, configs[0])
        return []
    if sweep.config.metric is None:
        raise ConfigError(f"{file}: metric is missing, by which a local sweep compares; add it")
    from flowrl.commands.env import usable_cores
    from flowrl.sweep.local import run_local

    return run_local(
        sweep,
        folder=output or Path("runs/sweeps") / sweep.name,
        jobs=jobs,
        cores=usable_cores() or 1,
        trials=trials,
        say=_say,
    )


def check(sweep: Sweep, config: Config) -> None:
    """All that `flowrl train` checks before it loads a model, and the sweep's metric.

    Raises:
        ConfigError: a name, an argument or a combination does not exist.
        DataError: a prompt file cannot be read.
    """
    from flowrl.build import build_method
    from flowrl.calls import check_call
    from flowrl.fits import check_compute, check_teacher, measured_rewards
    from flowrl.policies.flow import guidance_rows
    from flowrl.sources import ADAPTER_KEYS, build_rewards, find_adapter, load_named_prompts

    where = f"{sweep.file}: {sweep.command.config}"
    method = build_method(config, where)
    adapter = find_adapter(config.model, where)
    check_call(adapter, config.model.args, where=f"{where}: model.args", given=ADAPTER_KEYS)
    rows = guidance_rows(adapter, config.model.guidance_scale)
    check_teacher(method, config, where, rows)
    check_compute(method, config, where, rows)
    rewards = build_rewards(config.rewards, config.scoring, where=f"{where}: rewards")
    measured = measured_rewards(config, rewards.group_scope, where)
    build_rewards(measured, where=f"{where}: eval.rewards")
    prompts = load_named_prompts(config.eval.data, where=f"{where}: eval.data")
    prompts = prompts[: config.eval.max_prompts]
    labels = [reward.label for reward in measured]
    tags = sorted({str(prompt.metadata.get("tag", "")) for prompt in prompts} - {""})
    check_metric(sweep, config, measured=labels, tags=tags)


def _describe(sweep: Sweep) -> str:
    config = sweep.config
    names = ", ".join(each.name for each in sweep.dimensions)
    limit = f", at most {config.run_cap} runs" if config.run_cap is not None else ""
    runs = f", {len(sweep.grid)} points" if config.method == "grid" else ""
    metric = config.metric
    aim = f", to {metric.goal} {metric.name}" if metric is not None else ""
    return f"{config.method} over {names}{runs}{limit}{aim}"


def _print_commands(sweep: Sweep, config: Config) -> None:
    """How W&B runs the sweep, and what an agent will run.

    Raises:
        ConfigError: its runs would tell W&B nothing.
    """
    if "wandb" not in config.track.trackers or config.track.mode != "online":
        raise ConfigError(
            f"{sweep.file}: command: its runs would tell W&B nothing; add "
            "'track.trackers=[wandb]' and track.mode=online, or use --local"
        )
    project = sweep.config.project or config.track.project
    values = next(iter(sweep.corners()))
    line = shlex.join(sweep.command.line(values))
    # What stands in the file needs no option.
    option = [] if sweep.config.project else ["--project", project]
    create = shlex.join(["wandb", "sweep", *option, str(sweep.file)])
    owner = f"{sweep.config.entity or 'ENTITY'}/{project}"
    _say(f"  {create}\n  wandb agent {owner}/SWEEP_ID      (the first command prints the id)")
    _say(f"from this folder, where a run is such as:\n  {line}")


def _say(line: str) -> None:
    print(line, flush=True)
