"""vLLM's worker on CPU, with the profiling step of a GPU's. It makes the buffers in which the later parts of a pipeline receive
activations; without it vLLM 0.32.0 fails there (`GPUModelRunner.sync_and_gather_intermediate_tensors`)."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker


class Profiled(CPUWorker):
    def determine_available_memory(self) -> int:
        self.model_runner.profile_run()
        return super().determine_available_memory()
