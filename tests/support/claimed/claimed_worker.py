"""vLLM's worker on CPU, with its warm-up also where nothing is compiled: it makes the buffers in which the later parts of a
pipeline receive activations. Without it vLLM 0.32.0 fails there (`GPUModelRunner.sync_and_gather_intermediate_tensors`)."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker


class Warmed(CPUWorker):
    def _should_warm_up_model(self) -> bool:
        return True
