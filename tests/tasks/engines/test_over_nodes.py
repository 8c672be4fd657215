"""An engine over two nodes of a Ray cluster gives what an engine of one process gives. The nodes claim GPUs that they do not
have, and vLLM computes on CPU (`claimed_platform.py`): vLLM's executor, its placement and its workers are the real ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from places import CHECKOUT, PLUGINS
from ray_nodes import Nodes, nodes
from scoring import model_folder, tokens

from storage.artifacts.digests import weights_digest
from storage.schemas import schema_for
from storage.store import ArtifactSpec, Store
from tasks.engines.local import LocalModel
from tasks.engines.teacher import Host, Passage, Vocabulary
from tasks.signals import Ask
from tasks.workers.jobs import ArtifactRef, ModelRef, Request, SampleJob, SampleShard, Sampling
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig

sys.path.insert(0, str(PLUGINS))
from scripted_jobs import ScriptedJob

pytestmark = pytest.mark.slow
CLAIMED = CHECKOUT / "tests" / "support" / "claimed"
ENGINE = {"kv_cache_gib": 0.125, "max_num_seqs": 8}
ROWS = 264


@pytest.fixture(scope="module")
def two() -> Iterator[Nodes]:
    with nodes(2, 2, addresses=(None, "127.0.0.2"), gpus=2, also=(CLAIMED,)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return model_folder(folder, "teacher", 1, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("here")
    here = RuntimeConfig.model_validate({"device": "cpu", "threads": 1, "sampler": ENGINE})
    with WorkerPool(here, folder / "logs") as pool:
        return sampled(folder / "store", pool, model)


def over_nodes(cluster: Nodes, folder: Path, **roles: dict) -> WorkerPool:
    on_ray = {"device": "cuda", "threads": 1, "cluster": {"kind": "ray", "address": cluster.address}}
    return WorkerPool(
        RuntimeConfig.model_validate(on_ray | roles), folder / "logs", ("engine_over_nodes",), str(PLUGINS)
    )


def sampled(root: Path, workers: WorkerPool, model: Path) -> list[dict]:
    """Six completions of a model, in two shards. All of its weights are proven."""
    store = Store(root)
    rows = [
        {"prompt_id": f"p{i}", "split": "train", "text": "x", "token_ids": tokens("p", i, length=4 + i)}
        for i in range(6)
    ]
    with store.building(ArtifactSpec.of("prepare", 1, {"prompts": 6}, {})) as builder:
        builder.write_shard("prompts", 0, pa.Table.from_pylist(rows, schema=schema_for("prompts")))
        prompts = builder.commit(content={"prompts:train": "p"})
    with store.building(ArtifactSpec.of("rollout", 1, {}, {})) as builder:
        job = SampleJob(
            store=str(root),
            target=ArtifactRef("rollout", builder.key),
            prompts=ArtifactRef.of(prompts),
            split="train",
            model=ModelRef(str(model), weights_digest(model), ""),
            dtype="float32",
            longest=32,
            log_table="rollouts",
        )
        how = Sampling(0.8, 0.9, 0, 16, [])
        shards = [
            SampleShard(n, how, [Request(f"p{i}/1/0", f"p{i}", 0, i) for i in range(3 * n, 3 * n + 3)]) for n in (0, 1)
        ]
        _, answers = workers.share("sampler", job, shards)
        artifact = builder.commit(tables={"rollouts": 2})
    assert answers[0].proof["params_unproven"] == 0 and answers[0].proof["probe_tokens"] > 0
    return store.read_table(artifact, "rollouts").to_pylist()


def placed(folder: Path, role: str) -> bool:
    """Whether the log has the engine on both nodes."""
    log = (folder / "logs" / f"{role}.log").read_text()
    [line] = [line for line in log.splitlines() if line.startswith(f"{role}: an engine of 1 GPU on each of 2 nodes")]
    return "(127.0.0.2)" in line and line.count("(") == 3


@pytest.mark.parametrize(
    "how",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "in_process": True}],  # as on a GPU, and as on a CPU
    ids=["tensor", "pipeline"],
)
def test_an_engine_over_two_nodes_samples_what_one_process_samples(two, model, expected, tmp_path, how):
    with over_nodes(two, tmp_path, sampler={"engine_nodes": 2, **how, **ENGINE}) as pool:
        found = sampled(tmp_path / "store", pool, model)
    assert placed(tmp_path, "sampler")
    assert [row["completion_token_ids"] for row in found] == [row["completion_token_ids"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["sampling_logprobs"] == pytest.approx(other["sampling_logprobs"], abs=1e-4)


def test_a_teacher_over_two_nodes_gives_what_the_local_one_gives(two, model, tmp_path):
    passages = [Passage(tokens("p", i, length=3 + i), tokens("c", i, length=n)) for i, n in enumerate([4, 1, 40])]
    (tmp_path / "passages").write_text(json.dumps([[list(one.prompt), list(one.completion)] for one in passages]))
    (tmp_path / "teacher").symlink_to(model)
    engine = {"tensor_parallel_size": 1, "pipeline_parallel_size": 2, "nodes": 2}
    with over_nodes(two, tmp_path, scorer={"teacher_engine": engine}) as pool:
        assert pool.run("scorer", ScriptedJob(do="score", value=ROWS, path=str(tmp_path))).value == len(passages)
    assert placed(tmp_path, "scorer")
    found = json.loads((tmp_path / "logprobs").read_text())
    local = LocalModel(model, "float32", Host("cpu", 32, settings={"threads": 1}))
    for one, other in zip(
        found, local.score(passages, Ask(logprobs=True), Vocabulary(ROWS, ROWS), {})["logprobs"], strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-4)
