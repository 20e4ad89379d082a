"""What the files of a checkpoint hold: manifest, extra values and weights.

A manifest lists every other file with its size and sha256, so that damage is found before anything
is loaded. Weights are nested mappings and lists of tensors: the tensors are one safetensors file,
the nesting is JSON beside it. Reading order: `seal`, `verify`, `write_weights`, `read_weights`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from flowrl import __version__
from flowrl.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
EXTRA = "extra.json"
TENSORS = "weights.safetensors"
STRUCTURE = "weights.json"

_TENSOR = "__tensor__"


def seal(folder: Path, *, step: int, serial: int, num_processes: int) -> None:
    """Bring all files of a folder to the disk and list them in its manifest.

    Args:
        folder: filled with everything but the manifest.
        step: training steps done.
        serial: place in the order of saving.
        num_processes: ranks that saved a random state.
    """
    files = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        sync(file)
        files[file.relative_to(folder).as_posix()] = fingerprint(file)
    manifest = {
        "format": FORMAT,
        "flowrl": __version__,
        "step": step,
        "serial": serial,
        "num_processes": num_processes,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    for each in (*(sub for sub in folder.rglob("*") if sub.is_dir()), folder):
        sync(each)


def verify(folder: Path, remedy: str = "choose another checkpoint") -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        folder: the checkpoint.
        remedy: ends the error's message.

    Raises:
        CheckpointError: names the first file that is missing or was changed.
    """
    for name, stored in read_manifest(folder, remedy)["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing from the checkpoint; {remedy}")
        found = fingerprint(file)
        if found != stored:
            kind = "bytes" if found["bytes"] != stored["bytes"] else "sha256"
            raise CheckpointError(
                f"{file} is damaged: expected {kind} {stored[kind]}, found {found[kind]}; {remedy}"
            )


def read_manifest(folder: Path, remedy: str = "delete it or choose another one") -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, unreadable or of another format.
    """
    file = folder / MANIFEST
    try:
        manifest = _read_json(file)
        version = int(manifest["format"])
        _ = dict(manifest["files"]), int(manifest["serial"]), int(manifest["num_processes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {error}), so {folder} is not a "
            f"complete checkpoint; {remedy}"
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has the checkpoint format {version}, this flowrl reads {FORMAT}; resume "
            f"with the version of flowrl that wrote it ({manifest.get('flowrl', 'unknown')})"
        )
    return manifest


def read_extra(folder: Path) -> dict[str, Any]:
    """The `extra` of a checkpoint (step, configuration, ...), without touching anything else."""
    return _read_json(folder / EXTRA)


def write_weights(state: Mapping[str, Any], folder: Path) -> None:
    """Store a `Weights.state_dict()`.

    Args:
        state: mappings with text keys, lists, tensors, numbers, texts, None; nested at will.
        folder: gets the two files.

    Raises:
        TypeError: for anything else in `state`; names the place.
    """
    tensors: dict[str, Tensor] = {}
    structure = _take_tensors(state, "weights", tensors, set())
    (folder / STRUCTURE).write_text(json.dumps(structure), encoding="utf-8")
    save_file(tensors, folder / TENSORS)


def read_weights(folder: Path) -> dict[str, Any]:
    """What `write_weights` stored, its tensors on the CPU; tuples have become lists."""
    tensors = load_file(folder / TENSORS)

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {_TENSOR}:
                return tensors[value[_TENSOR]]
            return {key: fill(each) for key, each in value.items()}
        return [fill(each) for each in value] if isinstance(value, list) else value

    filled: dict[str, Any] = fill(_read_json(folder / STRUCTURE))
    return filled


def sync(path: Path) -> None:
    """Return when a file, or the list of a folder's entries, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _read_json(file: Path) -> dict[str, Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    """`value` as JSON can hold it; its tensors move to `tensors` and leave their names behind."""
    if isinstance(value, Tensor):
        cpu = value.detach().cpu().contiguous()
        if cpu.untyped_storage().data_ptr() in storages:  # safetensors refuses shared memory
            cpu = cpu.clone()
        storages.add(cpu.untyped_storage().data_ptr())
        tensors[name] = cpu
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}; weights are stored by text keys")
        return {
            key: _take_tensors(each, f"{name}/{key}", tensors, storages)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [
            _take_tensors(each, f"{name}/{index}", tensors, storages)
            for index, each in enumerate(value)
        ]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{name} is a {type(value).__name__}; weights are tensors, texts, numbers, and mappings "
        "and lists of these"
    )
