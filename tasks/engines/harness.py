"""The harness worker: lm-eval on a checkpoint, loaded as the scorer loads it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from storage.disk.redact import redact
from storage.errors import InputError
from storage.schemas import schema_for
from storage.store import Store
from tasks.engines.forward import placement
from tasks.engines.hf_folder import load_causal_lm
from tasks.inputs.harness import HarnessConfig, digest_of, load, task_manager
from tasks.inputs.shipped import load_tokenizer
from tasks.workers.jobs import HarnessJob, HarnessResult
from tasks.workers.main import Link

_TABLES = {"harness_results": "results", "harness_samples": "samples"}


class Harness:
    """Serves HarnessJob (role harness). The model stays between jobs on the same one."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._model: _Counted | None = None
        self._of: tuple[str, str] | None = None

    def handle(self, job: HarnessJob, link: Link) -> HarnessResult:
        """Run the task and write the tables that are missing. InputError where the task is not what the job was made for."""
        config = HarnessConfig.model_validate_json(bytes(job.config))
        manager = task_manager(None if job.folder is None else Path(job.folder))
        if digest_of(load(manager, config.task), config) != job.digest:
            raise InputError(
                f"--tasks {config.task}: its files or data have changed since the call began; call it again"
            )
        model = self._loaded(job, config)
        model.reports_to(link)
        found = simple_evaluate(
            model=model,
            tasks=[config.task],
            task_manager=manager,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.chat_template,
            log_samples=True,
        )
        assert found is not None  # None is for further ranks
        rows = {"results": result_rows(found), "samples": sample_rows(found)}
        writer = Store(job.store).shard_writer(job.target.stage, job.target.key)
        for table in job.tables:
            writer.write_shard(table, 0, pa.Table.from_pylist(rows[_TABLES[table]], schema=schema_for(table)))
        return HarnessResult()

    def close(self) -> None:
        """Nothing to end."""

    def _loaded(self, job: HarnessJob, config: HarnessConfig) -> _Counted:
        wanted = (job.model.path, config.dtype)
        if self._model is None or self._of != wanted:
            self._model = None  # two models need not fit beside each other
            device = torch.device(self._settings["device"])
            torch.set_num_threads(self._settings["threads"])
            weights = load_causal_lm(
                Path(job.model.path),
                getattr(torch, config.dtype),
                device_map=placement(device, self._settings["devices_per_worker"]),
            )
            self._model = _Counted(
                pretrained=weights.eval().requires_grad_(False),
                tokenizer=copy.deepcopy(load_tokenizer(Path(job.model.path))),  # lm-eval sets fields of it
                batch_size=self._settings["batch_size"],
                backend="causal",
            )
            self._of = wanted
        return self._model


class _Counted(HFLM):  # type: ignore[misc]  # untyped where lm-eval is not installed
    """lm-eval's transformers model, which reports how many of its requests are answered."""

    _link: Link | None = None
    _done = _total = 0

    def reports_to(self, link: Link) -> None:
        self._link, self._done, self._total = link, 0, 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        self._total += len(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._total += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._total += len(requests)
        return super().generate_until(requests, disable_tqdm)

    def _model_call(self, inps: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        self._count(len(inps))
        return super()._model_call(inps, *args, **named)

    def _model_generate(self, context: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        self._count(len(context))
        return super()._model_generate(context, *args, **named)

    def _count(self, rows: int) -> None:
        """Report those before this batch as done. Requests with one context share a row, and a long text has several rows."""
        if self._link is not None:
            self._link.progress(min(self._done, max(self._total - 1, 0)), self._total)
        self._done += rows


def result_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of harness_results from what lm-eval returns: one per task, metric and filter."""
    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, comma, filter_ = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_}")
            better = (found["higher_is_better"].get(task) or {}).get(metric)
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filter_,
                    "value": float(value),
                    "se": float(error) if isinstance(error, int | float) else None,
                    "n": _documents(found, task),
                    "num_fewshot": found["n-shot"].get(task),
                    "task_version": str(found["versions"].get(task, "")),
                    "higher_is_better": better if isinstance(better, bool) else None,
                }
            )
    return rows


def _documents(found: Mapping[str, Any], task: str) -> int:
    """Of a group those of all tasks in it."""
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_documents(found, child) for child in found["group_subtasks"].get(task, ()))


def sample_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of harness_samples: one per document, filter and metric."""
    return [
        {
            "task": task,
            "doc_id": sample["doc_id"],
            "filter": sample["filter"],
            "metric": metric,
            "value": float(value) if isinstance(value := sample[metric], int | float) else None,
            "request": redact(str(sample["arguments"][0][0])),
            "answers": redact(_text(sample["filtered_resps"])),
            "target": redact(str(sample["target"])),
        }
        for task, samples in sorted(found["samples"].items())
        for sample in samples
        for metric in sample["metrics"]
    ]


def _text(answers: Sequence[Any]) -> str:
    return json.dumps(answers, ensure_ascii=False, default=str)
