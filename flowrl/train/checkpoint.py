"""Checkpoints: a run's whole state, in place completely or not at all.

A save fills a hidden folder beside the others, syncs it, adds a manifest of sizes and hashes and
is published by one rename; only then are older ones deleted. accelerate writes optimiser,
scheduler, scaler and each rank's random state; of the network only `Weights.state_dict()` is
stored. Reading order: `Checkpoints.save`, `find`, `load`; what the files hold is in `statefiles`,
which of them a run goes on from in `resume`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.other import load as load_pickled

from flowrl.errors import CheckpointError, ConfigError, FlowrlError, closest
from flowrl.train import statefiles

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flowrl.protocols import Weights

_log = logging.getLogger(__name__)
# The suffix is there when a step is saved again, so that no moment has neither of the two.
_NAME = re.compile(r"step_(\d{6,})(?:\.(\d+))?")
_UNFINISHED = ".step_*.tmp"


@dataclass(frozen=True)
class _Saved:
    """A complete checkpoint: its folder, step, and place in the order of saving."""

    path: Path
    step: int
    serial: int


class Checkpoints:
    """The checkpoints of a run, in one folder.

    With several processes every rank makes the same calls; the folder must be on a file system
    that all of them see.

    Args:
        folder: holds one folder per checkpoint, `step_000123`; made by the first save.
        keep: how many are kept; the ones saved first are deleted.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        if keep < 1:
            raise ConfigError(f"checkpoint.keep={keep} would keep no checkpoint; use 1 or more")
        self.folder = folder
        self.keep = keep

    def save(
        self, accelerator: Accelerator, step: int, extra: Mapping[str, Any], weights: Weights
    ) -> Path:
        """Write the state of all ranks and, once it is in place, delete the oldest beyond `keep`.

        Args:
            accelerator: knows the optimiser, the scheduler and the scaler.
            step: training steps done.
            extra: whatever else the run needs, as JSON can hold it (tuples become lists).
            weights: the network's parameter sets.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written, on any rank; what
                was half written is removed, older checkpoints are as they were.
        """
        text = json.dumps(dict(extra), indent=1)  # a caller's mistake shows before anything moves
        partial = self.folder / f".step_{step:06d}.tmp"
        try:
            with Together(accelerator, self.folder):
                if accelerator.is_main_process:
                    self._clean()
                    partial.mkdir(parents=True)
            with Together(accelerator, self.folder):
                _save_accelerator(accelerator, partial)
                state = weights.state_dict()
                if accelerator.is_main_process:
                    statefiles.write_weights(state, partial)
                    (partial / statefiles.EXTRA).write_text(text, encoding="utf-8")
            path = ""
            with Together(accelerator, self.folder):
                if accelerator.is_main_process:
                    path = str(self._publish(partial, step, accelerator.num_processes))
        except BaseException:  # Ctrl-C as well: nothing half written stays behind
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return Path(_from_main(path))

    def find(self, resume: str | None) -> Path | None:
        """The checkpoint that `run.resume` asks for.

        Args:
            resume: "latest" is the one saved last (folders left by a killed save are ignored);
                otherwise the path of a checkpoint's folder; None = start from the beginning.

        Returns:
            The folder, whose content `load` verifies; None for None.

        Raises:
            CheckpointError: there is none, or a folder here has lost its manifest.
        """
        if resume is None:
            return None
        if resume == "latest":
            saved = self._saved(strict=True)
            if not saved:
                raise CheckpointError(
                    f"run.resume=latest, but {self.folder} holds no complete checkpoint; "
                    "drop run.resume to start from the beginning"
                )
            return saved[-1].path
        path = Path(resume)
        if not (path / statefiles.MANIFEST).is_file() or path.name.startswith("."):
            known = [str(each.path) for each in self._saved(strict=False)]
            hint = closest(resume, known) if known else "there is none yet; drop run.resume"
            raise CheckpointError(f"run.resume={resume} is not a checkpoint; {hint}")
        return path

    def load(self, accelerator: Accelerator, path: Path, weights: Weights) -> dict[str, Any]:
        """Put the state of a checkpoint back into everything that `save` took it from.

        All files are verified first, so a damaged checkpoint changes nothing.

        Args:
            accelerator: prepared as it was for saving. The number of processes may differ: noise
                derives from the seed, but a rank without stored random state keeps its own.
            path: from `find`.
            weights: the network's parameter sets.

        Returns:
            The `extra` that was saved.

        Raises:
            CheckpointError: a file is missing or damaged, or the state does not fit this run.
        """
        path = Path(path)
        with Together(accelerator, path):
            if accelerator.is_main_process:
                statefiles.verify(path, self._remedy(path))
        manifest = statefiles.read_manifest(path)
        with Together(accelerator, path):
            try:
                weights.load_state_dict(statefiles.read_weights(path))
                _load_accelerator(accelerator, path)
            except (RuntimeError, ValueError, KeyError, FileNotFoundError) as error:
                raise CheckpointError(
                    f"{path} does not fit this run ({error}); resume with the model, method and "
                    "optimiser that wrote it, or drop run.resume"
                ) from error
            _check_random_state(path, accelerator.process_index, manifest["num_processes"])
        return statefiles.read_extra(path)

    # ----------------------------------------------------------------------- on the main process

    def _publish(self, partial: Path, step: int, num_processes: int) -> Path:
        """Seal a filled folder, give it its name in one move, and rotate."""
        before = self._saved(strict=False)
        serial = 1 + max((each.serial for each in before), default=-1)
        statefiles.seal(partial, step=step, serial=serial, num_processes=num_processes)
        path = self.folder / f"step_{step:06d}"
        attempt = 1
        while path.exists():
            attempt += 1
            path = self.folder / f"step_{step:06d}.{attempt}"
        os.rename(partial, path)
        statefiles.sync(self.folder)
        replaced = [each for each in before if each.step == step]
        others = [each for each in before if each.step != step]
        surplus = max(0, len(others) - (self.keep - 1))
        for each in [*replaced, *others[:surplus]]:
            self._delete(each.path)
        return path

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint; from its first moment on it no longer looks like one."""
        hidden = path.with_name(f".{path.name}.deleted.tmp")
        os.rename(path, hidden)
        shutil.rmtree(hidden)

    def _clean(self) -> None:
        """Remove what killed saves and deletions left."""
        for leftover in self.folder.glob(_UNFINISHED):
            shutil.rmtree(leftover)

    def _remedy(self, damaged: Path) -> str:
        """What to do when a checkpoint turns out to be damaged: the others, newest first."""
        others = [each.path for each in self._saved(strict=False) if each.path != damaged]
        if not others:
            return "drop run.resume to start from the beginning"
        names = " or ".join(f"run.resume={path}" for path in reversed(others))
        return f"resume from another one: {names}"

    def _saved(self, *, strict: bool) -> list[_Saved]:
        """All checkpoints here in the order of saving, which is not that of steps after a resume.

        Those without a readable manifest come first, or are refused where `strict`.
        """
        saved = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match is None or not path.is_dir():
                continue
            try:
                serial = int(statefiles.read_manifest(path)["serial"])
            except CheckpointError:
                if strict:
                    raise
                serial = -1
            saved.append(_Saved(path, int(match[1]), serial))
        return sorted(saved, key=lambda each: (each.serial, each.step, each.path.name))


# --------------------------------------------------------------------------- accelerate


class Together:
    """A block that all ranks leave together: what fails on one is raised on every one.

    Without it a rank whose disk is full would leave the others waiting for it.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator = accelerator
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        own = None if error is None else _explain(error, self.folder)
        failed = [
            (rank, each) for rank, each in enumerate(gather_object([own])) if each is not None
        ]
        if isinstance(error, OSError) or (error is not None and _is_disk_full(error)):
            raise CheckpointError(own) from error
        if error is None and failed:
            rank, message = failed[0]
            raise CheckpointError(f"process {rank}: {message}")


def _explain(error: Exception, folder: Path) -> str:
    """A failure in a person's terms."""
    if isinstance(error, FlowrlError):
        return str(error)
    if _is_disk_full(error):
        root = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(root).free / 1e6
        return (
            f"the disk is full: {folder} could not take another checkpoint ({free:.1f} MB free); "
            "the older ones are intact. Free some space, or lower checkpoint.keep or choose "
            "another run.output_dir, and go on with run.resume=latest"
        )
    if isinstance(error, OSError):
        return (
            f"{folder}: {error}; the older checkpoints are intact. Make the folder usable and go "
            "on with run.resume=latest"
        )
    return f"{type(error).__name__}: {error}"


def _is_disk_full(error: Exception) -> bool:
    # safetensors and torch.save report a failed write in words of their own, without an errno.
    signs = ("No space left on device", "unexpected pos", "file write failed", "iostream error")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(cause) for sign in signs):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _save_accelerator(accelerator: Accelerator, folder: Path) -> None:
    """Everything that accelerate keeps but the networks, which the hook takes from its list."""

    def leave_out(models: list[Any], states: list[Any], output_dir: str) -> None:
        states.clear()

    hook = accelerator.register_save_state_pre_hook(leave_out)
    try:
        accelerator.save_state(str(folder))
    finally:
        hook.remove()


def _load_accelerator(accelerator: Accelerator, folder: Path) -> None:
    """The counterpart of `_save_accelerator`."""

    def leave_out(models: list[Any], input_dir: str) -> None:
        models.clear()

    hook = accelerator.register_load_state_pre_hook(leave_out)
    try:
        accelerator.load_state(str(folder))
    finally:
        hook.remove()


def _from_main(text: str) -> str:
    """The main process's text, on every rank."""
    return str(broadcast_object_list([text])[0])


def _check_random_state(path: Path, rank: int, num_processes: int) -> None:
    """Raise unless this rank's random state was restored: accelerate only logs when it fails."""
    if rank >= num_processes:
        _log.info("%s has no random state of rank %d; it keeps its own", path, rank)
        return
    file = path / f"random_states_{rank}.pkl"
    try:
        stored = load_pickled(file)["torch_manual_seed"]
    except Exception as error:  # whatever the pickle of another version of numpy raises
        raise CheckpointError(
            f"{file} cannot be read ({error}); resume with the versions that wrote it"
        ) from error
    if not torch.equal(stored, torch.get_rng_state()):
        raise CheckpointError(
            f"{file} was not restored, so the run would not go on as it was; resume with the "
            "versions of torch and numpy that wrote it"
        )
