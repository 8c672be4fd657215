"""The DeepSpeed configuration of a training: the user's file and the project's settings. Imports no engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from tasks.trainer.config import OptimizerSettings

_OURS = {
    "optimizer": "train.lr, betas, eps, weight_decay",
    "scheduler": "train.schedule",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "train.dtype",
    "fp16": "train.dtype (float32 or bfloat16)",
    "train_batch_size": "train.samples_per_step",
    "train_micro_batch_size_per_gpu": "runtime.trainer.micro_batch_tokens",
    "gradient_accumulation_steps": "runtime.trainer.micro_batch_tokens",
    "data_types": "train.dtype",
    "communication_data_type": "train.dtype",
}


def deepspeed_config(path: str | None, settings: OptimizerSettings, parameters: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration: the user's file (ZeRO stage, offload, buckets) and the project's settings.

    bfloat16 at ZeRO stage 0 runs as stage 1, the first stage at which DeepSpeed accumulates gradients in float32.
    Raises ConfigError for an unreadable file and for keys that the experiment's config sets."""
    config: dict[str, Any] = {}
    if path is not None:
        try:
            config = json.loads(Path(path).read_text("utf-8-sig"), object_pairs_hook=_without_duplicates)
            if not isinstance(config, dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"runtime.trainer.deepspeed: {path} is not a readable JSON file ({error})") from error
    for key, instead in _OURS.items():
        if key in config:
            raise ConfigError(f"{path}: {key!r} is set by {instead}; remove it from the DeepSpeed file")
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    for offload in ("offload_optimizer", "offload_param"):
        if (zero.get(offload) or {}).get("device") == "nvme":
            raise ConfigError(f"{path}: zero_optimization.{offload}.device: nvme is not supported; use cpu")
    if settings.dtype == "bfloat16":
        zero["stage"] = stage = max(stage, 1)
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    zero.setdefault("reduce_bucket_size", min(max(parameters, 1), 500_000_000))
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
        # stage 0 has no step of its own: `Engine.step` clips there
        "gradient_clipping": (settings.max_grad_norm or 0.0) if stage else 0.0,
    }
    return config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError for a key that occurs twice: all but the last of its values would be lost."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} occurs twice in one object, remove one of them")
        found[name] = value
    return found
