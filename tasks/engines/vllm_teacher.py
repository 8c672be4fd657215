"""A teacher in vLLM, inside the scorer's process: the engine prefills prompts with their completions and returns the
log-probabilities of these tokens with their candidates (`prompt_logprobs`), raw and at temperature 1."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import ConfigError, OpdError
from tasks.engines.hf_folder import model_rows, other_architecture, positions, read_config
from tasks.engines.listed import Listed, candidates, readable, refuse_unreadable, unfold, values_of
from tasks.engines.teacher import Host, Passage, Vocabulary
from tasks.engines.vllm_engine import prepare_environment, quieten, spread
from tasks.engines.weight_proof import judge_weights
from tasks.rollout_config import Dtype
from tasks.signals import Ask, Values

if TYPE_CHECKING:
    from torch import Tensor

_KV_CACHE_BYTES = 2**30
"""On CPU; on a GPU the cache takes what `teacher_memory_utilization` leaves."""
_SEQUENCES = 64


class VllmModel:
    """A `Teacher`. The engine is built when the first passages show how long they are, and again for longer ones. Its parameters
    are compared with the checkpoint's. InputError, StaleWeights."""

    def __init__(self, folder: Path, dtype: Dtype, host: Host, entropy_k: int) -> None:
        self.folder, self.rows = folder, model_rows(folder)
        self._dtype, self._host, self._entropy_k = dtype, host, entropy_k
        self._on_cpu = host.device == "cpu"
        self._limit = positions(read_config(folder))
        self._llm: Any = None
        self._length = 0
        prepare_environment(self._on_cpu, eager=True, threads=int(host.settings.get("threads", 1)))

    def check(self, passages: Sequence[Passage], names: Sequence[str]) -> None:
        """See `Teacher`, and `refuse_unreadable` for what is refused."""
        for passage, name in zip(passages, names, strict=True):
            refuse_unreadable(passage, name, self.rows, self._limit, str(self.folder))
        longest = max((len(passage.prompt) + len(passage.completion) + 1 for passage in passages), default=1)
        if longest > self._length:
            self.close()
            self._build(longest)

    def score(
        self,
        passages: Sequence[Passage],
        ask: Ask,
        vocabulary: Vocabulary,
        given: Mapping[int, Sequence[np.ndarray]],
    ) -> Values:
        """See `Teacher`."""
        from vllm import SamplingParams

        k = candidates(ask, self._entropy_k, self.rows)
        how = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=k, flat_logprobs=True, detokenize=False
        )
        sent = [readable(passage, self.rows) for passage in passages]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids, _ in sent], how, use_tqdm=False)
        if len(outputs) != len(passages):
            raise OpdError(f"the teacher's engine answered {len(outputs)} of {len(passages)} sequences")
        listed = [
            unfold(_listed(output.prompt_logprobs, ids, count, k), passage, self.rows)
            for output, (ids, count), passage in zip(outputs, sent, passages, strict=True)
        ]
        return values_of(listed, ask, vocabulary, self._entropy_k)

    def distributions(self, passages: Sequence[Passage], vocabulary: Vocabulary) -> Iterator[Tensor]:
        """Not to be had from vLLM (`Capabilities`)."""
        raise ConfigError("supervise.teacher: kind vllm cannot give its whole distribution")

    def close(self) -> None:
        """Shut the engine down explicitly: at the interpreter's exit it may abort the process."""
        llm, self._llm, self._length = self._llm, None, 0
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    def _build(self, longest: int) -> None:
        import os

        # set for each engine: the sampler's worker is another process, but a plugin may share this one
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not self._on_cpu))
        from vllm import LLM

        quieten()
        length = max(32, 1 << (longest - 1).bit_length())  # room, so that later passages seldom need another engine
        length = min(length, self._limit or length)
        machine = self._machine()
        if name := other_architecture(read_config(self.folder)):
            machine["hf_overrides"] = {"architectures": [name]}
        self._llm = LLM(
            model=str(self.folder),
            skip_tokenizer_init=True,
            trust_remote_code=False,
            load_format="safetensors",  # auto would fall back to pickles
            dtype=self._dtype,
            seed=0,
            max_model_len=length,
            max_num_seqs=min(_SEQUENCES, self._host.chunk_tokens),
            # logits of a whole step's prompt tokens exist at once; without seeds a prompt may be prefilled in pieces
            max_num_batched_tokens=max(self._host.chunk_tokens, 32),
            enable_chunked_prefill=True,
            enforce_eager=True,
            generation_config="vllm",  # a checkpoint's own defaults act on the generated token alone; none are wanted
            max_logprobs=-1,  # 20 otherwise
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=False,  # a cached prefix has no log-probabilities
            worker_extension_cls="tasks.engines.weight_proof.EngineWeights",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **machine,
        )
        reports = self._llm.collective_rpc("opd_compare_weights", args=(str(self.folder),))
        judge_weights(reports, self.folder, need_all=False)
        self._length = length

    def _machine(self) -> dict[str, Any]:
        """The part of vLLM's arguments that depends on the device."""
        if self._on_cpu:
            return {"kv_cache_memory_bytes": _KV_CACHE_BYTES}
        settings = self._host.settings
        engine = settings.get("teacher_engine", {})
        return {
            "gpu_memory_utilization": float(settings.get("teacher_memory_utilization", 0.5)),
            **spread(
                engine.get("tensor_parallel_size") or self._host.devices,
                engine.get("pipeline_parallel_size", 1),
                engine.get("nodes", 1),
            ),
        }


def _listed(flat: Any, ids: Sequence[int], count: int, k: int) -> Listed:
    """The last `count` tokens of a prompt, from vLLM's flat lists: of every token but the first itself, then its k candidates."""
    if flat is None or len(flat) != len(ids) or len(flat.token_ids) != (len(ids) - 1) * (k + 1):
        raise OpdError(f"the teacher's engine gave {len(flat or ())} of {len(ids)} tokens, or lists shorter than {k}")
    token_ids = (
        np.array(flat.token_ids, np.int64).reshape(-1, k + 1)[-count:] if count else np.empty((0, k + 1), np.int64)
    )
    logprobs = np.array(flat.logprobs, np.float32).reshape(-1, k + 1)[-count:] if count else np.empty((0, k + 1))
    if count and token_ids[:, 0].tolist() != list(ids[-count:]):
        raise OpdError("the teacher's engine gave log-probabilities of other tokens than it was asked about")
    return Listed(logprobs[:, 0].astype(np.float32), token_ids[:, 1:], logprobs[:, 1:].astype(np.float32))
