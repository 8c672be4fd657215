"""A pair of real language models on real text: SmolLM2-135M teaches 20 of its own 30 layers."""

from __future__ import annotations

import json

import pytest
from families import config

from flows.experiment import experiment_of
from flows.run.runner import run_experiment


@pytest.mark.slow
@pytest.mark.usefixtures("own_workers")
@pytest.mark.timeout(1800)
def test_two_rounds_bring_a_cut_student_nearer_to_its_teacher(tmp_path):
    from benchmarks.smollm2 import QUESTIONS, STUDENT_LAYERS, SUBJECTS, smollm2  # reads a model with torch

    student = smollm2(tmp_path / "student", STUDENT_LAYERS)
    teacher = smollm2(tmp_path / "teacher")
    texts = [question.format(subject) for subject in SUBJECTS[:12] for question in QUESTIONS[:3]]
    for name, some in (("train", texts[8:]), ("eval", texts[:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in some))
    data = config(
        student,
        teacher,
        tmp_path / "train.jsonl",
        rollout={"prompts_per_round": 16, "num_generations": 2, "max_completion_length": 48},
        objective={"support": {"kind": "teacher_topk", "k": 32, "outside": "bucket"}},
        train={"samples_per_step": 8, "lr": 1e-4},
        evaluate={"max_completion_length": 48, "greedy": False, "verifier": None, "kl_generations": 2},
        runtime={"sampler": {"max_num_seqs": 32, "kv_cache_gib": 0.5}},
        policy={"rounds": 2},
    )
    experiment = experiment_of(data, "smollm2")
    state, _ = run_experiment(experiment, name="run", root=tmp_path / "store", prefect=False)
    kl = [entry.metrics["reverse_kl"] for entry in state.rounds]
    assert state.status == "finished" and len(kl) == 3
    assert kl[2] < kl[1] < kl[0]
    assert kl[2] < 0.8 * kl[0], kl
