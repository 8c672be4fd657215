"""TensorBoard: event files, written without torch and TensorFlow."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from flows.trackers.base import Point, Tracked, Tracker, TrackerConfig, register

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event


@register
class TensorBoard(TrackerConfig):
    """Event files in a folder per run; `tensorboard --logdir FOLDER` shows them."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: Path | None = Field(
        None, description="parent of the runs' folders; null: trackers/tensorboard in the store"
    )
    module: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"

    def open(self, run: Tracked) -> Tracker:
        return _EventFile(run, (self.folder or run.folder / "tensorboard") / run.name)


class _EventFile:
    """One event file per call in the run's folder. TensorBoard reads all files of a folder as one run."""

    def __init__(self, run: Tracked, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.id = str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}.opd"
        self._file = place.open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if run.id is None:
            for summary in _about(run):
                self._write(Event(wall_time=time.time(), step=0, summary=summary))
        self._file.flush()

    def log(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self._write(Event(wall_time=time.time(), step=point.number, summary=Summary(value=values)))
        self._file.flush()

    def close(self, status: str) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())


def _about(run: Tracked) -> list[Any]:
    """The config as text, and as hyperparameters for the HPARAMS tab."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    text = "\n".join(f"    {line}" for line in json.dumps(run.config, indent=2).splitlines())
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    flat = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in run.hyperparameters().items()
    }
    return [
        Summary(value=[Summary.Value(tag="config", tensor=tensor, metadata=metadata)]),
        hparams_pb(flat, trial_id=run.name),
    ]
