"""The command line: what the user can act on is one message and exit code 2, never a traceback.

Kills, among others: an error that exits with 0 or 1; a message cut or wrapped by the terminal's
width; an interrupt that reports success; a disk-full error shown as a traceback.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from flowrl import __version__
from flowrl.__main__ import _Commands, app
from flowrl.commands import env
from flowrl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """\
run: {name: tiny, steps: 2}
model: {id: shapes}
method: {name: mix_grpo}
data: {train: shapes/train, num_groups: 2, group_size: 4}
rewards: [{name: shapes_strict}]
optim: {lr: 1e-4}
compute: {micro_batch_size: 4, rollout_batch_size: 4, decode_batch_size: 4}
eval: {num_steps: 4}
"""


def flowrl(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowrl", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FLOWRL_DEBUG": "0", **environment},
        timeout=120,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "rl.yaml"
    path.write_text(CONFIG.replace("lr: 1e-4", "lr: 1e-4, epohcs: 2"))
    return path


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_typo_is_one_message_and_exit_code_2(command: str, config: Path) -> None:
    done = flowrl(command, config, "run.name=x")
    assert done.returncode == 2
    assert f"{config}: optim.epohcs is not a key of section 'optim'" in done.stderr
    assert "did you mean 'epochs'?" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stdout == ""


def test_a_typo_in_an_override_names_the_override(config: Path) -> None:
    config.write_text(CONFIG)
    done = flowrl("train", config, "optim.lrr=1")
    assert done.returncode == 2
    assert "override 'optim.lrr=1'" in done.stderr
    assert "did you mean 'lr'?" in done.stderr


def test_debug_shows_the_traceback(config: Path) -> None:
    for done in (
        flowrl("--debug", "check", config),
        flowrl("check", config, FLOWRL_DEBUG="1"),
    ):
        assert done.returncode not in (0, 2)
        assert "Traceback" in done.stderr
        assert "did you mean 'epochs'?" in done.stderr


def test_a_wrong_command_line_exits_2() -> None:
    runner = CliRunner()
    for arguments in (["trian"], ["train"], ["sample", "shapes"], ["eval", "shapes", "--seed=x"]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2, arguments
    assert "train" in runner.invoke(app, ["trian"]).stderr


@pytest.mark.parametrize("command", ["train", "check", "eval", "sample", "report", "env"])
def test_every_command_has_help_for_every_option(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    typed = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    assert typed.help
    for parameter in typed.params:
        assert parameter.help, (command, parameter.name)


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"flowrl {__version__}\n"


# ------------------------------------------------------------------------- exit codes


def run_raising(error: BaseException, *, debug: bool = False) -> tuple[int, str]:
    """Exit code and standard error of a command that raises, run by the real group."""
    toy = typer.Typer(cls=_Commands, pretty_exceptions_enable=False)

    @toy.callback()
    def options(debug: Annotated[bool, typer.Option("--debug")] = False) -> None: ...

    @toy.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(toy, ["--debug", "fail"] if debug else ["fail"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def test_a_long_message_is_neither_wrapped_nor_read_as_markup() -> None:
    message = "rl.yaml: [bold]list[/bold] " + "x" * 300 + " run.steps=1"
    assert run_raising(ConfigError(message)) == (2, f"Error: {message}\n")


def test_an_interrupt_exits_130() -> None:
    assert run_raising(KeyboardInterrupt()) == (130, "Stopped: interrupted\n")


def test_a_full_disk_is_told_with_its_file_and_remedy() -> None:
    code, text = run_raising(OSError(errno.ENOSPC, "No space left on device", "runs/a/model.pt"))
    assert code == 2
    assert "the disk is full, writing runs/a/model.pt" in text
    assert "run.resume=latest" in text
    wrapped = RuntimeError("cannot save")
    wrapped.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert run_raising(wrapped)[0] == 2
    # As safetensors words it.
    assert run_raising(Exception("Error while serializing: No space left on device"))[0] == 2


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_raising(ZeroDivisionError("a bug"))
    with pytest.raises(OSError, match="denied"):
        run_raising(PermissionError(errno.EACCES, "denied"))
    with pytest.raises(ConfigError):
        run_raising(ConfigError("refused"), debug=True)


# ------------------------------------------------------------------------- flowrl env


def test_env_lists_versions_threads_and_commit() -> None:
    rows = dict(env.describe_environment())
    assert rows["flowrl"] == __version__
    assert rows["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert rows["torch"][0].isdigit()
    assert rows["torch threads"].split()[0].isdigit()
    assert {"commit", "CUDA build", "CUDA devices", "OMP_NUM_THREADS", "accelerate"} <= set(rows)


def test_env_survives_missing_and_broken_packages(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcuda.so: not found')")
    code = "from flowrl.commands import env; env.PACKAGES = ('no-such-package',); env.run()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        timeout=120,
        check=True,
    )
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert rows["torch import"].strip() == "failed: OSError: libcuda.so: not found"
    assert rows["no-such-package"].strip() == "not installed"
