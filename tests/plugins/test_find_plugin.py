"""Entry points of a distribution on the path, found by name, whatever kind of plug-in they are.

Kills, among others: a group that nobody reads, or that is read for another kind; plug-ins that are
imported before they are asked for; an error that does not say where, or says it twice.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest

from flowrl.errors import ConfigError
from flowrl.plugins import Kind, find_plugin

KINDS: tuple[Kind, ...] = get_args(Kind)
MODULE = "flowrl_fake_plugin"
OURS = ("waves", "mosaic")
WHERE = "run.yaml: x.name=y"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with a plug-in of each kind, and two of each that cannot be loaded."""
    groups = [
        f"[flowrl.{kind}s]\nmy_{kind} = {MODULE}:{kind}\nlost = {MODULE}:nothing\n"
        "broken = flowrl_fake_absent:x\n"
        for kind in KINDS
    ]
    info = tmp_path / f"{MODULE}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(groups))
    objects = [f"def {kind}():\n    return '{kind}'\n" for kind in KINDS]
    (tmp_path / f"{MODULE}.py").write_text("\n".join(objects))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)


def refused(name: str, kind: Kind) -> str:
    with pytest.raises(ConfigError) as caught:
        find_plugin(name, kind, OURS, where=WHERE)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugin_is_found_by_name_or_path_and_loaded_only_then(kind: Kind) -> None:
    refused("my_plugin", kind)
    assert MODULE not in sys.modules
    assert find_plugin(f"my_{kind}", kind, OURS, where=WHERE)() == kind
    assert find_plugin(f"{MODULE}:{kind}", kind, OURS, where=WHERE)() == kind


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_found_is_said_once_and_where(kind: Kind) -> None:
    unknown = refused("mosiac", kind)
    assert unknown.startswith(f"{WHERE} is not a {kind}; did you mean 'mosaic'?")
    assert all(f"my_{each}" not in unknown for each in KINDS if each != kind)
    assert f"did you mean 'my_{kind}'" in refused(f"mi_{kind}", kind)
    for name, reason in {
        "lost": "has no attribute 'nothing'",
        "broken": "No module named 'flowrl_fake_absent'",
        f"{MODULE}:nothing": f": {MODULE} has no 'nothing'",
        "flowrl_fake_absent:x": ": there is no module 'flowrl_fake_absent'",
        "./absent.py:x": ": there is no file ",
    }.items():
        text = refused(name, kind)
        assert text.startswith(f"{WHERE}: ") and reason in text and text.count(WHERE) == 1
