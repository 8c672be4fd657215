"""Trackers: where a run's metrics also go, beside the store. One class each, chosen by `kind` in the config's `trackers`.

A class holds its fields and opens a run in its tracker. Its package is imported when a run begins, never by reading a config. A
plugin brings another one by `opdflow.plugin.register`."""

from flows.trackers import mlflow, tensorboard, trackio, wandb
from flows.trackers.base import TRACKERS, Point, Tracked, Tracker, TrackerConfig, register, require_trackers

AnyTracker = TRACKERS.annotation(names=True)
"""The type of one entry of `trackers`."""

__all__ = [
    "AnyTracker", "Point", "Tracked", "Tracker", "TrackerConfig", "mlflow", "register", "require_trackers", "tensorboard",
    "trackio", "wandb",
]  # fmt: skip
