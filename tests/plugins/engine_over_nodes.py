"""A plugin: the real sampler, and the real scorer with a teacher in vLLM. Their engines compute on CPUs, and are spread over
nodes that claim GPUs (`tests/support/claimed`) as on GPUs."""

from __future__ import annotations

from typing import Any

from opdflow.plugin import register_role
from tasks.engines import vllm_teacher
from tasks.engines.sampler import Sampler
from tasks.engines.scorer import Scorer
from tasks.engines.vllm_engine import VllmEngine

register_role("sampler", f"{__name__}:SamplerOnCpus")
register_role("scorer", f"{__name__}:ScorerOnCpus")


class Engine(VllmEngine):
    def _machine(self) -> dict[str, Any]:
        on_cpu, self.on_cpu = super()._machine(), False
        on_gpus, self.on_cpu = super()._machine(), True
        return on_gpus | on_cpu


class SamplerOnCpus(Sampler):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings | {"device": "cpu"})
        self.engine = Engine(self.settings)


class Model(vllm_teacher.VllmModel):
    def _machine(self) -> dict[str, Any]:
        on_cpu, self._on_cpu = super()._machine(), False
        on_gpus, self._on_cpu = super()._machine(), True
        return on_gpus | on_cpu


class ScorerOnCpus(Scorer):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings | {"device": "cpu"})
        vllm_teacher.VllmModel = Model
