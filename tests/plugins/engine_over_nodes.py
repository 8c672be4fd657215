"""A plugin: the real sampler, and a real teacher in vLLM. Their engines compute on CPUs, and are spread over nodes that claim
GPUs (`tests/support/claimed`) as on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripted_jobs import ScriptedAnswer, ScriptedJob

from opdflow.plugin import register_role
from tasks.engines.sampler import Sampler
from tasks.engines.teacher import Host, Passage, Vocabulary
from tasks.engines.vllm_engine import VllmEngine
from tasks.engines.vllm_teacher import VllmModel
from tasks.signals import Ask

register_role("sampler", f"{__name__}:SamplerOnCpus")
register_role("scorer", f"{__name__}:TeacherOnCpus")


class Engine(VllmEngine):
    def _machine(self) -> dict[str, Any]:
        on_cpu, self.on_cpu = super()._machine(), False
        on_gpus, self.on_cpu = super()._machine(), True
        return on_gpus | on_cpu


class SamplerOnCpus(Sampler):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings | {"device": "cpu"})
        self.engine = Engine(self.settings)


class Model(VllmModel):
    def _machine(self) -> dict[str, Any]:
        on_cpu, self._on_cpu = super()._machine(), False
        on_gpus, self._on_cpu = super()._machine(), True
        return on_gpus | on_cpu


class TeacherOnCpus:
    """Log-probabilities of the passages in `<path>/passages`, by the teacher in `<path>/teacher`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def handle(self, job: ScriptedJob, link) -> ScriptedAnswer:
        folder = Path(job.path)
        host = Host("cpu", 32, self.settings["devices_per_worker"], self.settings)
        model = Model(folder / "teacher", "float32", host, 20)
        passages = [Passage(*pair) for pair in json.loads((folder / "passages").read_text())]
        try:
            model.check(passages, [str(number) for number in range(len(passages))])
            values = model.score(passages, Ask(logprobs=True), Vocabulary(job.value, job.value), {})
        finally:
            model.close()
        (folder / "logprobs").write_text(json.dumps([array.tolist() for array in values["logprobs"]]))
        return ScriptedAnswer(len(passages))

    def close(self) -> None: ...
