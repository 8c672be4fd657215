"""MLflow: a server, or a SQLite file."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import ClassVar, Literal, TypeVar

from pydantic import Field

from flows.trackers.base import Point, Tracked, Tracker, TrackerConfig, register

METRICS, PARAMETERS = 1000, 100
"""The most that MLflow takes in one request."""
LONGEST = 6000
"""Characters of a parameter's value."""
_ENDED = {"failed": "FAILED", "stopped": "KILLED"}
T = TypeVar("T")


@register
class MLflow(TrackerConfig):
    """A run of an MLflow experiment. Names and passwords of a server come from MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = Field(
        None,
        description="tracking URI without a password in it; null: MLFLOW_TRACKING_URI, without it a SQLite file in the store",
    )
    experiment: str = Field("opdflow", description="the experiment")
    group: str | None = Field(None, description="value of the tag `group`; null: the run that this one was forked from")
    module: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    def problem(self) -> str | None:
        if (why := super().problem()) is not None:
            return why
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
        if uri.startswith("file:") or (uri and "://" not in uri and uri not in ("databricks", "uc")):
            return f"uri {uri!r} is a folder, which MLflow no longer writes; use sqlite:////PATH/mlflow.db or a server's http://"
        return None

    def open(self, run: Tracked) -> Tracker:
        return _Run(self, run)


class _Run:
    def __init__(self, config: MLflow, run: Tracked) -> None:
        os.environ.setdefault(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"
        )  # each waits longer; what is lost is sent by the next call
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for library in ("mlflow", "alembic"):  # they report the tables that they make
            logging.getLogger(library).setLevel(logging.WARNING)
        uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            run.folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{run.folder.absolute() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        if run.id is not None:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(config.experiment)
        place = known.experiment_id if known is not None else self._client.create_experiment(config.experiment)
        group = config.group or run.group
        tags = {"group": group} if group else {}
        self.id = self._client.create_run(place, run_name=run.name, tags=tags).info.run_id
        values = ((name, v if isinstance(v, str) else json.dumps(v)) for name, v in run.hyperparameters().items())
        for part in _in_parts((Param(name, value[:LONGEST]) for name, value in values), PARAMETERS):
            self._client.log_batch(self.id, params=part)

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = (Metric(name, value, now, point.number) for point in points for name, value in point.values.items())
        for part in _in_parts(metrics, METRICS):
            self._client.log_batch(self.id, metrics=part)

    def close(self, status: str) -> None:
        self._client.set_terminated(self.id, _ENDED.get(status, "FINISHED"))


def _in_parts(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while part := list(islice(items, size)):
        yield part
