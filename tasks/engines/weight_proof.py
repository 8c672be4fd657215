"""Proof that an engine computes with the checkpoint that it was told to load.

First every parameter inside the engine is compared with the checkpoint's tensors, bit for bit (stronger than comparing
checksums, and as cheap). The weights to compare are those that the engine *multiplies* with: on CPU vLLM packs the weights of
its linear layers into a private layout and drops the original, so there the weight is read back by sending the identity matrix
through the layer, which returns it exactly. This also catches an output head that kept its packed copy of old tied embeddings.
Then a few tokens are sampled and their log-probabilities compared with a transformers forward in float32: that needs no
knowledge of the engine's layout. It needs the whole model in float32 on the host, so the first sampler alone does it, and others
only where the comparison left something unproven, one at a time."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import nn

from storage.artifacts.digests import weight_files
from storage.errors import OpdError
from tasks.engines.hf_folder import load_causal_lm
from tasks.workers.memory import drop_pages

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

TOLERANCE = {"float32": 1e-4}
"""By engine dtype: the largest difference of a probe's log-probability, in nats, that rounding explains."""
TOLERANCE_LOW_PRECISION = 0.5
"""The same for 16-bit engines, whose rounding hides small changes: there the comparison of parameters is the proof."""
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Ends of the names of the tensor that a tied output head shares."""
_ROWS = 256
_EXPERTS = ("w13_weight", "w2_weight")
_EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What checkpoints call the three matrices of an expert."""
_SHOWN = 5


class StaleWeights(OpdError):
    """The engine does not compute with the checkpoint that it was told to load."""


class EngineWeights:
    """Extension of vLLM's worker class (`worker_extension_cls`): reloads its weights, and compares them with a checkpoint."""

    def opd_reload_weights(self, path: str, tied: bool) -> None:
        """Replace the weights by those of the checkpoint in the directory `path`, in place. vLLM does not reload an output head
        that is `tied` to the embeddings: it gets them here. On a CPU it would multiply with a packed copy of the old ones."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        self.reload_weights(weights_path=path)  # type: ignore[attr-defined]
        modules = list(self.model_runner.get_model().modules())  # type: ignore[attr-defined]
        heads = [module for module in modules if isinstance(module, ParallelLMHead)]
        embeddings = [module for module in modules if type(module) is VocabParallelEmbedding]
        if tied and len(heads) == len(embeddings) == 1:  # others are left to the comparison
            with torch.inference_mode():
                heads[0].tie_weights(embeddings[0])
                heads[0].quant_method.process_weights_after_loading(heads[0])

    def opd_compare_weights(self, path: str) -> dict[str, Any]:
        """Compare this worker's parameters with the checkpoint in the directory `path`.

        Returns counts and names: compared (parameters), elements, differing (names with the largest difference), unproven
        (parameters of a kind whose layout is not known here, or with the checkpoint's values in another order), unread (tensors
        that no parameter came from)."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]  # the worker's, which extends this class
        with torch.inference_mode():
            return compare_weights(model, Path(path))

    def opd_give_back(self) -> None:
        """Give memory back to the system: packed weights, which the next reload makes anew, and the pages of the key-value cache;
        whole pages read as zeros, as in a new engine. On a CPU, and while the cache holds nothing that is needed."""
        for module in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
            if hasattr(module, "cpu_linear"):
                module.cpu_linear = None
        for layer in self.model_runner.kv_caches:  # type: ignore[attr-defined]
            if isinstance(layer, torch.Tensor):
                drop_pages(layer.untyped_storage().data_ptr(), layer.untyped_storage().nbytes())


def compare_weights(model: nn.Module, path: Path) -> dict[str, Any]:
    """See `EngineWeights.opd_compare_weights`; `model` is vLLM's module tree of one tensor-parallel rank."""
    checkpoint = _Checkpoint(path, getattr(model, "hf_to_vllm_mapper", None))
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    compared = elements = 0
    differing: list[str] = []
    unproven: list[str] = []
    known: set[str] = set()
    for name, module in model.named_modules():
        of_experts = _experts(module, name, checkpoint) if hasattr(module, "w13_weight") else {}
        for parameter in (*of_experts, "weight", "bias"):
            if not isinstance(getattr(module, parameter, None), torch.Tensor):
                continue
            full = f"{name}.{parameter}"
            known.add(full)
            pairs = of_experts.get(parameter) or _pairs(module, name, parameter, packed, checkpoint)
            for how, actual, expected in pairs:
                if expected is None or actual.numel() != expected.numel():
                    unproven.append(full)
                    continue
                compared += 1
                elements += actual.numel()
                expected = expected.to(actual.device, actual.dtype)
                if actual.shape == expected.shape and torch.equal(actual, expected):
                    continue
                mine, theirs = (tensor.flatten().float().sort().values for tensor in (actual, expected))
                if torch.equal(mine, theirs):
                    unproven.append(
                        full
                    )  # the checkpoint's values in another order: the probes show whether it is the right one
                else:
                    differing.append(f"{full}{how} (up to {(mine - theirs).abs().max().item():.3g})")
    unproven += [name for name, _ in model.named_parameters() if name not in known]
    return {
        "compared": compared,
        "elements": elements,
        "differing": differing,
        "unproven": sorted(set(unproven)),
        "unread": checkpoint.unread(),
    }


class _Checkpoint:
    """Tensors of a checkpoint under the engine's names, read one at a time."""

    def __init__(self, path: Path, mapper: Any) -> None:
        self._files: dict[str, tuple[str, str]] = {}
        rename = _renamer(mapper)
        for file in weight_files(path):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping: it iterates by keys() only)
                    if (mapped := rename(name)) is not None:
                        self._files[mapped] = (str(file), name)
        self._read: set[str] = set()

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor of this name; the output head's falls back to the embedding's (tied embeddings), any to the name that the
        backbone alone gives it."""
        if name not in self._files and name.endswith("lm_head.weight"):
            tied = [other for other in self._files if other.endswith(_EMBEDDINGS)]
            name = tied[0] if len(tied) == 1 else name
        if name not in self._files:
            name = name.partition(".")[2]
        if name not in self._files:
            return None
        self._read.add(name)
        file, key = self._files[name]
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(key)

    def has(self, name: str) -> bool:
        return name in self._files

    def unread(self) -> list[str]:
        return sorted(name for name in self._files if name not in self._read and "rotary_emb" not in name)


def _renamer(mapper: Any) -> Any:
    """vLLM's own renaming of checkpoint tensors, without the fusing of projections (done here, part by part)."""
    if mapper is None:
        return lambda name: name
    if hasattr(mapper, "orig_to_new_stacked"):
        mapper = dataclasses.replace(mapper, orig_to_new_stacked={})
    return mapper.map_name if hasattr(mapper, "map_name") else mapper._map_name


def _pairs(
    module: nn.Module, name: str, parameter: str, packed: dict[str, list[str]], checkpoint: _Checkpoint
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """(which copy, what the engine holds, what the checkpoint holds) of one parameter."""
    stem, _, leaf = name.rpartition(".")
    prefix = f"{stem}." if stem else ""
    parts = [checkpoint.get(f"{prefix}{part}.{parameter}") for part in packed.get(leaf, [leaf])]
    held, embedding = getattr(module, parameter), hasattr(module, "shard_indices")
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        yield "", held, None
        return
    expected = _share(module, parameter, present)
    if parameter == "weight" and hasattr(module, "cpu_linear") and expected.ndim == 2 and not _lookup_only(module):
        # the layer's own width: its kernel does not check that of what it is given, and the checkpoint may have it transposed
        effective = read_back(module, _inputs(module, expected.shape[1]), held.dtype)
        yield " as multiplied with", effective[: expected.shape[0]] if embedding else effective, expected
        if held.numel() == 0:
            return  # only the packed copy exists
    if embedding:
        held = held[: expected.shape[0]]  # rows past the vocabulary are padding
    yield "", held, expected


def _experts(
    module: nn.Module, name: str, checkpoint: _Checkpoint
) -> dict[str, list[tuple[str, torch.Tensor, torch.Tensor | None]]]:
    """The same for the two fused weights of a layer of experts, (experts, 2 x inner, hidden) and (experts, hidden, inner).

    Their layout in the engine depends on device and kernel, so the checkpoint's tensors are laid out by the code that laid
    out the engine's. Without an expected tensor: experts spread over ranks, quantised, or stored under names not known here."""
    held = {parameter: getattr(module, parameter) for parameter in _EXPERTS}
    try:
        expected = _laid_out(module, name.removesuffix(".routed_experts"), checkpoint)
    except Exception:  # private code of vLLM and its kernels: what it does not do leaves the weights unproven
        traceback.print_exc()
        expected = None
    return {
        parameter: [(" as laid out for its kernel", held[parameter], expected[at] if expected else None)]
        for at, parameter in enumerate(_EXPERTS)
    }


def _laid_out(module: Any, prefix: str, checkpoint: _Checkpoint) -> list[torch.Tensor] | None:
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import convert_to_unquantized_kernel_format
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    method: Any = module.quant_method
    if not isinstance(method, UnquantizedFusedMoEMethod) or module.moe_config.moe_parallel_config.use_ep:
        return None
    where, count = module.moe_config.moe_parallel_config, module.moe_config.num_experts
    for gate, up, down in _EXPERT_NAMES:
        names = [[f"{prefix}.{expert}.{part}.weight" for part in (gate, up, down)] for expert in range(count)]
        if all(checkpoint.has(part) for parts in names for part in parts):
            break
    else:
        return None
    like = module.w13_weight
    upper, lower = list[torch.Tensor](), list[torch.Tensor]()
    for parts in names:
        first, second, third = (cast(torch.Tensor, checkpoint.get(part)).to(like.device, like.dtype) for part in parts)
        cut = [matrix.chunk(where.tp_size, dim=0)[where.tp_rank] for matrix in (first, second)]
        upper.append(torch.cat(cut))
        lower.append(third.chunk(where.tp_size, dim=1)[where.tp_rank])
    config = copy.copy(module.moe_config)
    w13, w2 = convert_to_unquantized_kernel_format(
        method.unquantized_backend, moe_config=config, w13_weight=torch.stack(upper), w2_weight=torch.stack(lower)
    )
    layer = nn.Module()  # stands in for the engine's layer, which must not change
    layer.moe_config, layer.activation = config, module.activation
    layer.w13_weight, layer.w2_weight = (nn.Parameter(weight, requires_grad=False) for weight in (w13, w2))
    kernel: Any = method.moe_kernel
    copy.copy(kernel.fused_experts).process_weights_after_loading(layer)
    return [layer.w13_weight, layer.w2_weight]


def read_back(module: nn.Module, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (out, in) that a linear layer multiplies with, exactly: products with rows of the identity have one
    non-zero term each."""
    method = cast("LinearBase", module).quant_method
    rows = []
    for start in range(0, columns, _ROWS):
        stop = min(start + _ROWS, columns)
        unit = torch.zeros(stop - start, columns, dtype=dtype)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
        rows.append(method.apply(module, unit, None))
    return torch.cat(rows).T


def _inputs(module: nn.Module, default: int) -> int:
    """The width of what a layer multiplies with, on this rank."""
    for name in ("input_size_per_partition", "input_size", "embedding_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return default


def _lookup_only(module: nn.Module) -> bool:
    """Whether an embedding is only looked up; the output head is multiplied with."""
    return hasattr(module, "shard_indices") and type(module).__name__ == "VocabParallelEmbedding"


def _share(module: nn.Module, parameter: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """This rank's rows or columns of the checkpoint's tensors, fused as the module holds them."""
    world = getattr(module, "tp_size", 1)
    rank = getattr(module, "tp_rank", 0)
    if hasattr(module, "shard_indices"):
        where = cast("VocabParallelEmbedding", module).shard_indices
        return parts[0][where.org_vocab_start_index : where.org_vocab_end_index]
    if world == 1:
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    kind = {base.__name__ for base in type(module).__mro__}
    if "QKVParallelLinear" in kind:
        heads = cast("QKVParallelLinear", module)
        replica = rank // heads.num_kv_head_replicas
        value: int = getattr(heads, "v_head_size", heads.head_size)
        sizes = [heads.num_heads * heads.head_size, heads.num_kv_heads * heads.head_size, heads.num_kv_heads * value]
        blocks = [(rank, sizes[0]), (replica, sizes[1]), (replica, sizes[2])]
        return torch.cat([part.narrow(0, at * size, size) for part, (at, size) in zip(parts, blocks, strict=True)])
    if "ColumnParallelLinear" in kind:  # the merged ones too: each part is cut by itself
        return torch.cat([part.chunk(world, dim=0)[rank] for part in parts])
    if "RowParallelLinear" in kind and parameter == "weight":
        return parts[0].chunk(world, dim=1)[rank]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def judge_weights(reports: list[dict[str, Any]], path: Path, need_all: bool) -> dict[str, Any]:
    """Sum up the workers' comparisons. Raises StaleWeights where a parameter differs, and with `need_all` (no probes
    follow) also where one could not be compared."""
    differing = [name for report in reports for name in report["differing"]]
    if differing:
        raise StaleWeights(
            f"the engine holds other weights than {path}: {len(differing)} parameters differ, e.g."
            f" {'; '.join(differing[:_SHOWN])}"
        )
    # a part of a pipeline reads its own layers only
    unread = set[str].intersection(*(set(report["unread"]) for report in reports)) if reports else set[str]()
    unproven = sorted(unread.union(*(report["unproven"] for report in reports)))
    compared = sum(report["compared"] for report in reports)
    if (need_all and unproven) or not compared:
        raise StaleWeights(
            f"the engine's weights could not all be compared with {path}: {len(unproven)} of unknown layout, e.g."
            f" {'; '.join(unproven[:_SHOWN])}. Set runtime.sampler.verify_weights to full, which adds probes"
        )
    return {
        "params_compared": compared,
        "elements_compared": sum(report["elements"] for report in reports),
        "params_unproven": len(unproven),
    }


@contextmanager
def one_reference(path: Path) -> Iterator[None]:
    """In the block no other process of this machine holds a float32 copy of this checkpoint for its probes."""
    with (path / "config.json").open("rb") as file:
        with suppress(OSError):  # a file system without locks: then they only need more memory
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reference_logprobs(path: Path, sequences: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Log-probabilities of completions by transformers in float32 on CPU: one tensor (T,) per (prompt, completion)."""
    model = load_causal_lm(path, torch.float32).eval()
    result = []
    with torch.inference_mode():
        for prompt, completion in sequences:
            logits_TV = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logprobs_TV = torch.log_softmax(logits_TV.double(), dim=-1)
            result.append(logprobs_TV.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return result


def judge_probes(
    path: Path, sequences: list[tuple[list[int], list[int]]], engine: list[list[float]], dtype: str, held: bool = False
) -> dict[str, Any]:
    """Compare the engine's log-probabilities (temperature 1, nothing cut off) with transformers'.

    Raises StaleWeights when they are further apart than the engine's dtype explains. `held`: all parameters were compared."""
    largest = 0.0
    for expected_T, found in zip(reference_logprobs(path, sequences), engine, strict=True):
        gap = (expected_T - torch.tensor(found, dtype=torch.float64)).abs().max().item()
        largest = max(largest, gap) if gap == gap else float("inf")
    limit = TOLERANCE.get(dtype, TOLERANCE_LOW_PRECISION)
    if largest > limit:
        why = (
            "; it holds the right weights, so vLLM and transformers compute this architecture differently"
            if held
            else ""
        )
        raise StaleWeights(
            f"the engine's log-probabilities are not those of {path}: off by up to {largest:.3g} nats ({dtype} allows"
            f" {limit:g}){why}"
        )
    return {"probe_tokens": sum(len(completion) for _, completion in sequences), "max_logprob_difference": largest}
