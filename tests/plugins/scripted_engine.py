"""A plugin in the sampler's place: an engine of actors without vLLM, on the GPUs that the bridge has reserved."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from scripted_jobs import ScriptedAnswer, ScriptedJob

from opdflow.plugin import register_role

register_role("sampler", f"{__name__}:Engine")


class Part:
    """One process of the engine, with one GPU."""

    def where(self) -> tuple[str, str, int]:
        import ray

        here = ray.get_runtime_context()
        [gpu] = here.get_accelerator_ids()["GPU"]
        return here.get_node_id(), gpu, os.getpid()


class Engine:
    def __init__(self, settings: dict) -> None:
        self.parts: list = []

    def handle(self, job: ScriptedJob, link) -> ScriptedAnswer:
        """Writes to `path` where the worker and the parts of its engine are. `sleep`: the first one then waits to be killed."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from tasks.workers.reserve import join

        group = join()
        if not self.parts:
            for bundle in range(group.bundle_count):
                there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
                self.parts.append(ray.remote(Part).options(num_cpus=0, num_gpus=1, scheduling_strategy=there).remote())
        places = ray.get([part.where.remote() for part in self.parts])
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        found = {
            "pid": os.getpid(),
            "node": addresses[ray.get_runtime_context().get_node_id()],
            "parts": [(addresses[node], gpu, pid) for node, gpu, pid in places],
        }
        first = not Path(job.path).exists()
        Path(f"{job.path}.new").write_text(json.dumps(found))
        os.replace(f"{job.path}.new", job.path)
        if job.do == "sleep" and first:
            time.sleep(600)
        return ScriptedAnswer(len(self.parts), 0, os.getpid())

    def close(self) -> None: ...
