"""A small store to train on."""

from __future__ import annotations

import pytest
from trainer_world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("trainer") / "store")
