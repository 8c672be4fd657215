"""Checkpoints within a round: all ranks save together every few minutes, and continue from the last one after a kill.

Content: as in the state between rounds, float32 master weights and moments in safetensors (no pickle), one file with a share
of the parameters per rank, and the rows of the steps done. DeepSpeed's format is not used: it unpickles files, and its
`latest` can name a checkpoint before all ranks have written it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors.torch import save_file

from storage.artifacts.checkpoints import Checkpoint, Checkpoints, write_file
from storage.errors import CorruptArtifact
from tasks.trainer.engine import Engine
from tasks.trainer.state import TrainerState, share
from tasks.workers.jobs import TrainJob, WarmupJob
from tasks.workers.metrics import Progress

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a job continues from."""

    files: tuple[Path, ...]
    state: TrainerState
    rows: Rows
    """Rows of `training_steps` for the steps done."""


class Keeper:
    """The checkpoints of one job. Every rank makes the same calls."""

    def __init__(self, job: TrainJob | WarmupJob, minutes: float | None) -> None:
        place = job.checkpoints
        self._kept: Checkpoints | None = None
        if place is not None:
            self._kept = Checkpoints(Path(job.store), Path(place.folder), json.loads(bytes(place.numerics)))
        self._seconds = minutes * 60 if minutes is not None and place is not None else None
        self._saved = time.monotonic()

    def find(self, total: int, progress: Progress) -> Resumed | None:
        """The newest whole checkpoint, found by rank 0, which reports its messages to `progress`. `total`: steps of the job.
        Collective."""
        shared: list[Resumed | None] = [None]
        if dist.get_rank() == 0 and self._kept is not None:
            found, problems = self._kept.newest()
            resumed = _resumed(found) if found is not None else None
            done = len(resumed.rows) if resumed is not None else 0
            notes = [f"warning: {problem}" for problem in problems]
            if found is not None:
                notes.append(f"continuing after step {done} of {total} (saved {found.created})")
            elif problems:
                notes.append(f"warning: no checkpoint can be used: training restarts at the first of {total} steps")
            for note in notes:
                print(note, flush=True)
                progress(done, total, note=note)  # before any step, because this process may die before its result
            shared = [resumed]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def step_done(self, engine: Engine, settings: dict[str, Any], rows: Rows) -> None:
        """Saves if the interval has passed on rank 0's clock. `settings`: round and lora of the state. Collective."""
        if self._seconds is None:
            return
        due = torch.tensor([int(time.monotonic() - self._saved >= self._seconds)], device=engine.device)
        dist.broadcast(due, src=0)
        if due.item():
            self._save(engine, settings, rows)
            self._saved = time.monotonic()

    def _save(self, engine: Engine, settings: dict[str, Any], rows: Rows) -> None:
        assert self._kept is not None
        where = [self._kept.begin() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(where, src=0)
        folder = where[0]
        assert folder is not None
        tensors = share(engine)
        mine = write_file(folder / f"rank-{dist.get_rank():05d}.safetensors", lambda path: save_file(tensors, path))
        files: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(files, mine)
        if dist.get_rank() == 0:
            state = TrainerState(step=rows[-1]["step"], lr=rows[-1]["lr"], **settings)
            self._kept.commit(folder, len(rows), files, {"state": state.model_dump(mode="json"), "rows": rows})
        dist.barrier()


def _resumed(found: Checkpoint) -> Resumed:
    try:
        state = TrainerState.model_validate(found.content["state"])
        return Resumed(found.files, state, list(found.content["rows"]))
    except (KeyError, TypeError, ValidationError) as error:
        raise CorruptArtifact(f"{found.files[0].parent}: not a checkpoint of the trainer ({error})") from error
