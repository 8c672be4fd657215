"""Where the tests' files are."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIGS = CHECKOUT / "configs"
DATA = CHECKOUT / "tests" / "data"
PLUGINS = CHECKOUT / "tests" / "plugins"
TINY = DATA / "tiny.yaml"
