"""What `mixed_precision: auto` becomes."""

from pathlib import Path

import pytest
import torch

from flowrl.config import load_config
from flowrl.errors import ConfigError
from flowrl.fits import check_compute
from flowrl.methods import METHODS
from flowrl.precision import resolve_precision


@pytest.mark.parametrize("name", ["no", "fp16", "bf16"])
def test_what_is_named_is_taken(name: str) -> None:
    assert resolve_precision(name) == name


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "no"),
        ({"avx512_f": True, "avx512_bf16": True}, "bf16"),
        ({"bf16": True, "sve": False}, "bf16"),
        ({}, "no"),
    ],
)
def test_auto_is_bf16_only_where_the_processor_computes_in_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto") == expected


def test_auto_is_no_with_a_torch_that_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto") == "no"


def test_fp16_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    quickstart = Path(__file__).parents[1] / "configs/quickstart.yaml"
    config = load_config(quickstart, ["compute.mixed_precision=fp16"])
    with pytest.raises(ConfigError, match=r"^q: compute\.mixed_precision=fp16 needs a GPU"):
        check_compute(METHODS[config.method.name](), config, "q", 1)
