"""Fixtures of the fault tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import scripted_run


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with models and prompts, and no run yet."""
    return scripted_run.prepare_root(tmp_path_factory.mktemp("template") / "store")
