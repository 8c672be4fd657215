"""An engine over two nodes of a Ray cluster gives what an engine of one process gives. The nodes claim GPUs that they do not
have, and vLLM computes on CPU (`claimed_platform.py`): vLLM's executor, its placement and its workers are the real ones."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from places import CHECKOUT, PLUGINS
from ray_nodes import nodes
from scoring import model_folder, tokens

from storage.artifacts.digests import weights_digest
from storage.schemas import schema_for
from storage.store import ArtifactSpec, Store
from tasks.workers.jobs import ArtifactRef, ModelRef, Request, SampleJob, SampleShard, Sampling
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig

pytestmark = pytest.mark.slow
CLAIMED = CHECKOUT / "tests" / "support" / "claimed"
ENGINE = {"kv_cache_gib": 0.125, "max_num_seqs": 8}


def sampled(root: Path, workers, model: Path) -> list[dict]:
    """Six completions of a model, in two shards."""
    store = Store(root)
    rows = [
        {"prompt_id": f"p{i}", "split": "train", "text": "x", "token_ids": tokens("p", i, length=4 + i)}
        for i in range(6)
    ]
    with store.building(ArtifactSpec.of("prepare", 1, {"prompts": 6}, {})) as builder:
        builder.write_shard("prompts", 0, pa.Table.from_pylist(rows, schema=schema_for("prompts")))
        prompts = builder.commit(content={"prompts:train": "p"})
    with store.building(ArtifactSpec.of("rollout", 1, {"model": model.name}, {})) as builder:
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


@pytest.mark.parametrize("how", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_an_engine_over_two_nodes_samples_what_one_process_samples(tmp_path, how):
    model = model_folder(tmp_path, "model", 1, num_attention_heads=4, num_key_value_heads=2)
    here = RuntimeConfig.model_validate({"device": "cpu", "threads": 1, "sampler": ENGINE})
    with WorkerPool(here, tmp_path / "here") as pool:
        expected = sampled(tmp_path / "one", pool, model)
    with nodes(2, 2, addresses=(None, "127.0.0.2"), gpus=1, also=(CLAIMED,)) as cluster:
        runtime = RuntimeConfig.model_validate(
            {
                "device": "cuda",
                "threads": 1,
                "cluster": {"kind": "ray", "address": cluster.address},
                "sampler": {"engine_nodes": 2, **how, **ENGINE},
            }
        )
        with WorkerPool(runtime, tmp_path / "logs", ("engine_over_nodes",), str(PLUGINS)) as pool:
            found = sampled(tmp_path / "two", pool, model)
    assert [row["completion_token_ids"] for row in found] == [row["completion_token_ids"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["sampling_logprobs"] == pytest.approx(other["sampling_logprobs"], abs=1e-4)
