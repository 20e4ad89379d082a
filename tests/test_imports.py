"""Which module may import which (by syntax tree, deferred imports included), and what stays light.

Kills, among others: a trainer that knows a policy; a reward that needs flowrl; a formula that reads
the config; an `import torch` that reaches `flowrl --help`.
"""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("rewards", "pipelines", "tokenizers_vis")
EVERYTHING = ("flowrl", *SIBLINGS)

CONFIG = (
    "flowrl.config",
    "flowrl.schema",
    "flowrl.configdoc",
    "flowrl.calls",
    "flowrl.strict",
    "flowrl.yamlio",
)
RECORDS = ("flowrl.types", "flowrl.protocols", "flowrl.errors")

# What a module or package may import of ours besides itself. A name covers what lies below it, and
# the longest name that covers a module decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "flowrl.__init__": (),
    "flowrl.functional": (),
    "flowrl.errors": (),
    "flowrl.types": ("flowrl.errors",),
    "flowrl.protocols": ("flowrl.errors", "flowrl.types"),
    "flowrl.yamlio": ("flowrl.errors",),
    "flowrl.strict": ("flowrl.errors", "flowrl.yamlio"),
    "flowrl.calls": ("flowrl.errors", "flowrl.yamlio", "flowrl.strict"),
    "flowrl.schema": ("flowrl.strict",),
    "flowrl.config": (
        "flowrl.errors",
        "flowrl.yamlio",
        "flowrl.strict",
        "flowrl.calls",
        "flowrl.schema",
    ),
    "flowrl.configdoc": ("flowrl.config", "flowrl.strict"),
    # A page's costs are counted as `flowrl check` counts them.
    "flowrl.methodsdoc": ("flowrl.methods", "flowrl.commands.check", "flowrl.strict"),
    "flowrl.precision": (),
    "flowrl.methods": ("flowrl.functional", *RECORDS, *CONFIG),
    # A policy runs the plan of a method's spec, draws its noise where all seeds are derived, and
    # looks at the images of a data set when it trains on them.
    "flowrl.policies": (
        "flowrl.functional",
        "flowrl.methods.forward_plan",
        "flowrl.methods.spec",
        "flowrl.data.noise",
        "flowrl.data.pairs",
        *RECORDS,
    ),
    "flowrl.data": (*RECORDS, *CONFIG),
    "flowrl.train": ("flowrl.methods", "flowrl.data", "flowrl.__version__", *RECORDS, *CONFIG),
    "flowrl.compare": ("flowrl.train", "flowrl.__version__", *RECORDS, *CONFIG),
    "flowrl.sweep": ("flowrl.train", "flowrl.data.seeds", *RECORDS, *CONFIG),
    "flowrl.pretrain": (
        "flowrl.data.seeds",
        "flowrl.precision",
        "flowrl.train",
        *RECORDS,
        *CONFIG,
    ),
    "flowrl.tokenizer": (
        *SIBLINGS,
        "flowrl.__version__",
        "flowrl.data.seeds",
        "flowrl.pretrain",
        "flowrl.train",
        *RECORDS,
        *CONFIG,
    ),
    # A generator's training draws with the policy that aligns it, and reads a tokenizer's files.
    "flowrl.ar": (
        *SIBLINGS,
        "flowrl.__version__",
        "flowrl.data",
        "flowrl.functional",
        "flowrl.policies",
        "flowrl.pretrain",
        "flowrl.tokenizer.files",
        *RECORDS,
        *CONFIG,
    ),
    "flowrl.toys": ("flowrl.functional", *RECORDS),
    # What a reward returns is checked by the trainer's own gate.
    "flowrl.testing": (
        "flowrl.functional",
        "flowrl.train.attempts",
        "flowrl.train.border",
        "flowrl.train.scoring",
        *RECORDS,
    ),
    # Whether a tokenizer survives being saved is asked of the registry that saves it.
    "flowrl.testing.tokenizers": ("flowrl.testing", "tokenizers_vis.registry", *RECORDS),
    "flowrl.fits": ("flowrl.methods", "flowrl.data", *RECORDS, *CONFIG),
    "flowrl.plugins": ("rewards.registry", *RECORDS),
    "flowrl.sources": (
        *SIBLINGS,
        "flowrl.plugins",
        "flowrl.data",
        "flowrl.train.attempts",
        "flowrl.train.scoring",
        *RECORDS,
        *CONFIG,
    ),
    "flowrl.serve": ("rewards", "flowrl.sources", "flowrl.__version__", *RECORDS, *CONFIG),
    "flowrl.build": ("flowrl",),
    "flowrl.make": EVERYTHING,
    "flowrl.commands": ("flowrl",),
    "flowrl.commands.reward_tools": ("flowrl", "rewards"),
    "flowrl.commands.tokenizer_tools": ("flowrl", "tokenizers_vis"),
    "flowrl.rewardsdoc": ("rewards",),
    "flowrl.__main__": ("flowrl.__version__", "flowrl.errors", "flowrl.commands"),
    "rewards": (),
    "pipelines": ("tokenizers_vis",),
    "tokenizers_vis": (),
}
HEAVY = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "wandb",
    "numpy",
)
MAX_HELP_CPU_S = 0.5


def covers(name: str, module: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def imports(path: Path, root: Path) -> Iterator[str]:
    """Every module that a file imports; `from a import b` counts as a.b, whatever b is."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, node.module)) if node.module else ".".join(above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(root: Path) -> list[str]:
    found = []
    for top in EVERYTHING:
        for path in sorted((root / top).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            owners = [name for name in MAY_IMPORT if covers(name, module)]
            if not owners:
                found.append(f"{module} has no line in MAY_IMPORT; say what it may import")
                continue
            owner = max(owners, key=len)
            allowed = (owner, *MAY_IMPORT[owner])
            for name in imports(path, root):
                is_ours = any(covers(each, name) for each in EVERYTHING)
                if is_ours and not any(covers(each, name) for each in allowed):
                    found.append(f"{module} imports {name}; {owner} may import {allowed}")
    return found


def test_imports_go_one_way() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("flowrl/functional/a.py", "from flowrl.errors import ShapeError"),
        ("flowrl/functional/a.py", "from ..errors import ShapeError"),
        ("flowrl/types.py", "import flowrl.functional.sde"),
        ("flowrl/methods/a.py", "from flowrl.train import loop"),
        ("flowrl/train/a.py", "from flowrl import policies"),
        ("flowrl/train/a.py", "def f():\n    from flowrl.policies.flow import FlowPolicy"),
        ("flowrl/train/a.py", "from flowrl.functional.sde import ode"),
        ("flowrl/train/a.py", "from rewards import load"),
        ("flowrl/train/a.py", "from flowrl.compare import spec"),
        ("flowrl/compare/a.py", "from flowrl.commands import env"),
        ("flowrl/commands/a.py", "import pipelines"),
        ("flowrl/build.py", "import pipelines"),
        ("flowrl/sources.py", "import flowrl.policies"),
        ("flowrl/__init__.py", "from flowrl.config import Config"),
        ("flowrl/unplaced.py", ""),
        ("rewards/a.py", "import flowrl"),
        ("rewards/a.py", "from pipelines import sd3"),
        ("tokenizers_vis/a.py", "from pipelines import sd3"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("flowrl/functional/a.py", "from flowrl.functional import sde\nfrom .flow import x"),
        ("flowrl/methods/a.py", "import flowrl.functional.sde, flowrl.types, flowrl.config"),
        ("flowrl/build.py", "import flowrl.sources, flowrl.policies"),
        ("flowrl/sources.py", "import rewards, pipelines, tokenizers_vis"),
        ("flowrl/make/a.py", "from rewards.shapes import render"),
        ("pipelines/a.py", "import tokenizers_vis"),
        ("rewards/a.py", "import flowrlx, rewards.base"),
    ],
)  # fmt: skip
def test_an_allowed_import_is_not_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert violations(tmp_path) == []


def test_no_package_and_no_namesake_of_one_below_tests() -> None:
    folders = [path for path in (ROOT / "tests").rglob("*") if path.is_dir()]
    assert not [path for path in folders if (path / "__init__.py").exists()]
    assert not [path for path in (ROOT / "tests").glob("*") if path.name in EVERYTHING]


def run_python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import flowrl",
        "import flowrl.errors, flowrl.config, flowrl.compare.spec, flowrl.sweep.spec",
        "from flowrl.__main__ import main\n"
        "sys.argv = ['flowrl', '--help']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code",
    ],
    ids=["package", "config", "help"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    report = f"\nprint('loaded', [name for name in {HEAVY} if name in sys.modules])"
    assert run_python("-c", "import sys\n" + code + report).splitlines()[-1] == "loaded []"


def test_help_answers_within_half_a_second_of_cpu_time() -> None:
    run_python("-m", "flowrl", "--help")  # compiles the bytecode, once for all

    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = cpu_seconds()
    text = run_python("-m", "flowrl", "--help")
    assert cpu_seconds() - before < MAX_HELP_CPU_S
    names = ("train", "check", "eval", "sample", "report", "compare", "sweep", "env")
    assert all(name in text for name in names)
