"""Which GPUs hold which model, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import config, family, prompt_files

from flows.experiment import experiment_of
from flows.run import engine_checks
from flows.run.checked import Known, Model
from tasks.inputs.models import parameter_count

RAY = {"kind": "ray", "address": "127.0.0.1:1"}


def known(folder: Path, runtime: dict[str, Any], backend: str = "local", **sections: Any) -> Known:
    student = family(folder / "model", "qwen3", num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    given = config(student, student, prompt_files(folder), **sections)
    given["runtime"] = {"device": "cuda", "cluster": RAY, **runtime}
    given["supervise"] = {"teacher": backend}
    model = Model("student", student)
    return Known(experiment_of(given, "test"), model, (Model("teacher", student),), None)


@pytest.mark.parametrize(
    ("sampler", "gpu", "found"),
    [
        ({}, 2.0, None),
        ({}, 0.8, "spread it over 2 GPUs or more"),
        ({"tensor_parallel_size": 2}, 0.8, "note"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "engine_nodes": 2}, 0.4, "note"),
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "engine_nodes": 2},
            0.2,
            "spread it over 7 GPUs or more",
        ),
        ({"tensor_parallel_size": 3}, 2.0, "3 GPUs cannot share the 4 attention heads of student"),
        ({"pipeline_parallel_size": 4}, 2.0, "4 parts of the 2 layers of student"),
    ],
)
def test_an_engine_must_hold_its_share_of_the_weights(tmp_path, monkeypatch, sampler, gpu, found):
    """`gpu`: memory of the largest GPU, in weights of the student."""
    given = known(tmp_path, {"sampler": {"gpu_memory_utilization": 0.75, **sampler}})
    monkeypatch.setattr(engine_checks, "largest_gpu", lambda _: int(4 * parameter_count(given.student.path) * gpu))
    findings = list(engine_checks.spread(given))
    refused = [finding.text for finding in findings if finding.refused]
    if found in (None, "note"):
        assert refused == [] and len(findings) == (found is not None)
        assert all("runtime.sampler: student in float32 over" in finding.text for finding in findings)
    else:
        assert len(refused) == 1 and found in refused[0]


def test_an_engine_over_nodes_needs_what_it_is_for(tmp_path):
    over = {"teacher_engine": {"tensor_parallel_size": 2, "nodes": 2}}
    [finding] = engine_checks.over_nodes(known(tmp_path / "local", {"scorer": over}))
    assert finding.refused and finding.text.startswith(
        "runtime.scorer.teacher_engine.nodes: 2 nodes are for a teacher in vLLM"
    )
    assert list(engine_checks.over_nodes(known(tmp_path / "vllm", {"scorer": over}, "vllm"))) == []
    sampler = {"tensor_parallel_size": 2, "engine_nodes": 2}
    trb = {"behaviour": "trb", "top_p": 1.0, "max_completion_length": 8}
    [finding] = engine_checks.over_nodes(known(tmp_path / "trb", {"sampler": sampler}, rollout=trb))
    assert finding.refused and finding.text.startswith("runtime.sampler.engine_nodes: with rollout.behaviour 'trb'")
