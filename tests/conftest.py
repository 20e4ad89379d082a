"""Settings for all tests; torch is not imported here, so that light tests stay light."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes with a thread per core each get in each other's way, up to 80 times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a shared machine a single example may be slow for reasons of its own.
settings.register_profile("flowrl", deadline=None)
settings.load_profile("flowrl")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state per process, but every test is a run of its own."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
