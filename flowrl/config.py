"""A run's configuration: strict YAML and dotted overrides become one frozen `Config`.

Reading order: `load_config`; the records are in `flowrl.schema`. What is not understood is refused:
every failure is one `ConfigError` that names file, dotted key, what arrived, the closest match and
the remedy. Free arguments (`method.args`, `rewards[].args`) are checked against the function that
will receive them by `check_call`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flowrl import yamlio
from flowrl.calls import check_call
from flowrl.errors import ConfigError
from flowrl.schema import Config
from flowrl.strict import Key, Model, Record, apply_overrides, escape, fields, interpolate, validate

__all__ = ["Config", "check_call", "dump_config", "load_config", "plain", "read_record", "to_dict"]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a YAML file, with dotted overrides laid over it.

    A file may begin with `base: other.yaml` (relative to itself) and is then merged over that
    one: mappings key by key, lists as a whole. `${section.key}` stands for another key's value.

    Args:
        path: the YAML file.
        overrides: texts such as "optim.lr=1e-4" or "rewards.0.weight=0.5"; the values are YAML.

    Returns:
        The frozen configuration with all defaults filled in.

    Raises:
        ConfigError: with all problems, a line each.
    """
    config, by_override = read_record(Config, path, overrides)
    _refuse_idle(config, by_override)
    return config


def read_record(
    model: type[Model], path: str | Path, overrides: Iterable[str] = ()
) -> tuple[Model, dict[Key, str]]:
    """Any root record in a YAML file, read as `load_config` reads a run's.

    Returns:
        The record, and for each key that an override set the words that name it in errors.
    """
    path = Path(path)
    data: dict[str, Any] = {}
    sources: dict[Key, str] = {}
    for file, layer in _layers(path, ()):
        data = yamlio.merge(data, layer)
        sources |= dict.fromkeys(yamlio.leaves(layer), str(file))
    data, by_override = apply_overrides(data, overrides, str(path))
    data = interpolate(yamlio.merge(_defaults(model), data), str(path), sources | by_override)
    record = validate(model, data, where=str(path), sources=sources | by_override)
    return record, by_override


def _layers(path: Path, above: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """The file and the files that it is based on, the lowest first."""
    data = yamlio.read_yaml(path)
    if "base" not in data:
        return [(path, data)]
    base = data.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the path of a YAML file, got {yamlio.show(base)}")
    above = (*above, path.resolve())
    below = path.parent / base
    if below.resolve() in above:
        raise ConfigError(f"{path}: base: {base} leads back to a file above it; break the circle")
    if not below.is_file():
        hint = yamlio.files_beside(below)
        raise ConfigError(f"{path}: base: {base}: no such file relative to this one; {hint}")
    return [*_layers(below, above), (path, data)]


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """All defaults as plain data, so that an interpolation may name a key that no file sets."""
    data: dict[str, Any] = {}
    for key, field in fields(model):
        if field.is_required() or "[]" in key:
            continue
        *sections, name = key.split(".")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = plain(field.get_default(call_default_factory=True))
    return data


def _refuse_idle(config: Config, by_override: dict[Key, str]) -> None:
    """Raise for an override of a key that another key switches off: it would do nothing."""
    use_wandb = "wandb" in config.track.trackers
    needs: tuple[tuple[str, bool, str], ...] = (
        ("model.lora", config.model.tuning == "lora", "model.tuning=lora"),
        ("optim.ema_every", config.optim.ema_decay is not None, "optim.ema_decay=0.99 or so"),
        ("track.project", bool(config.track.trackers), "track.trackers=[wandb]"),
        ("track.entity", use_wandb, "track.trackers=[wandb]"),
        ("track.mode", use_wandb, "track.trackers=[wandb]"),
        ("track.tags", use_wandb, "track.trackers=[wandb]"),
        ("track.group", use_wandb, "track.trackers=[wandb]"),
    )
    for key, source in by_override.items():
        name = ".".join(key)
        for prefix, is_met, need in needs:
            if not is_met and f"{name}.".startswith(f"{prefix}."):
                raise ConfigError(f"{source}: {name} would do nothing here; it needs {need}")


def to_dict(config: Record) -> dict[str, Any]:
    """The configuration as nested plain data, every default filled in and tuples as lists."""
    data = plain(config.model_dump())
    assert isinstance(data, dict)
    return data


def plain(value: Any) -> Any:
    """The value with tuples as lists, as YAML knows them."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    return value


def dump_config(config: Record, path: str | Path) -> None:
    """Write the configuration, fully resolved, as YAML from which `load_config` gives an equal one.

    Args:
        config: what to write.
        path: the file; it is replaced in one move.
    """
    yamlio.write_yaml(escape(to_dict(config)), Path(path))
