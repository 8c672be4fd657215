"""Speed of supervision: CPU time of the scorer's whole job (reading rollouts, models, tables, Parquet) beside that of bare
forwards of the same models with their heads, over the same batches, and beside vLLM's `prompt_logprobs`.

python benchmarks/scoring.py [--tokens 2048] [--turns 5] [--threads 1] [--spread 10] [--only all|teacher|vllm]
[--profile scorer|vllm]

`bare` is the models as transformers runs them; `bare, oneDNN` the same with the scorer's product for the head.
Random models with a vocabulary of 151,936 ids: student 3 layers of 256, teacher 6 of 512. `spread` is the standard
deviation of their logits: at 10 entropies are about 1.3 nats, as of a language model; at 0.4 (an untrained model) a nucleus
is most of V. `--profile` prints where the scorer's time goes in place of a comparison."""

from __future__ import annotations

import argparse
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from record import record
from turns import Spent, in_turns, machine, ratios, spread, table

from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Store
from tasks.engines.forward import LoadedModel, plan_batches
from tasks.engines.scorer import Scorer
from tasks.engines.teacher import Passage, VllmTeacher
from tasks.inputs.models import ArchitectureModel, CheckpointModel, initialise, model_work
from tasks.inputs.prompts import PrepareConfig
from tasks.losses.needs import SignalNeed
from tasks.prepare import prepare_work
from tasks.rollout_config import RolloutConfig
from tasks.stage import Context, Prompts, Rollouts, Student, Teacher, Work
from tasks.supervise import SuperviseConfig, supervise_work
from tasks.workers.runtime import RuntimeConfig

V, K = 151_936, 64
SHAPES = {"student": (3, 256), "teacher": (6, 512)}
PROMPT, COMPLETION, SHARDS = 16, 128, 2
Ways = dict[str, Callable[[], Spent]]


class Pool:
    """In the place of worker processes: a scorer in this one."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.spent = Spent(0, 0)
        self._items: list[Any] = []
        self._results: list[Any] = []

    def share(self, role: str, job: Any, items: Iterable[Any], *_: Any) -> tuple[list[Any], list[Any]]:
        self._items, self._results = list(items), []
        before = Spent.now()
        answer = self.scorer.handle(job, self)  # type: ignore[arg-type]
        self.spent = Spent.now() - before
        return self._results, [answer]

    def next(self) -> Any:
        return self._items.pop(0) if self._items else None

    def done(self, result: Any) -> None:
        self._results.append(result)

    def progress(self, *_: Any, **__: Any) -> None:
        """Nobody looks."""


class World:
    """Models, prompts and rollouts in a store."""

    def __init__(self, root: Path, tokens: int, threads: int, spread: float) -> None:
        self.store, self.threads = Store(root / "store"), threads
        self.scorer = Scorer({"threads": threads})
        self.pool = Pool(self.scorer)
        self.context = Context(
            store=self.store,
            runtime=RuntimeConfig(device="cpu", threads=threads),
            workers=self.pool,  # type: ignore[arg-type]
            progress=lambda *_: None,
            log=lambda _: None,
        )
        self.folders = {name: self._folder(root / name, *shape, spread) for name, shape in SHAPES.items()}
        models = [self.make(model_work(CheckpointModel(path=folder), 0))["model"] for folder in self.folders.values()]
        self.student, self.teacher = models
        sources: dict[str, Any] = {}
        for split, text in (("train", "ab"), ("eval", "cd")):
            file = root / f"{split}.jsonl"
            file.write_text(f'{{"prompt": "{text}", "id": "{text}", "answer": "x"}}\n')
            sources[split] = {"kind": "file", "path": str(file)}
        self.prompts = self.make(prepare_work(PrepareConfig.model_validate(sources), *models))["prepare"]
        draw = np.random.default_rng(0)
        self.passages = [
            Passage(draw.integers(V, size=PROMPT), draw.integers(V, size=COMPLETION))
            for _ in range(tokens // COMPLETION)
        ]
        self.tokens = len(self.passages) * COMPLETION
        self.rollouts = self._rollouts()

    def _folder(self, folder: Path, layers: int, width: int, spread: float) -> Path:
        folder.mkdir()
        fields = {
            "model_type": "qwen3",
            "vocab_size": V,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "head_dim": 64,
            "max_position_embeddings": 512,
            "initializer_range": spread / width**0.5,  # hidden states have the norm sqrt(width)
            "tie_word_embeddings": False,
        }
        initialise(ArchitectureModel(config=fields), 1, folder)
        return folder

    def _rollouts(self) -> Artifact:
        with self.store.building(ArtifactSpec.of("rollout", 1, {"tokens": self.tokens}, {})) as builder:
            for shard, part in enumerate(np.array_split(np.arange(len(self.passages)), SHARDS)):
                rows = [self._row(int(number)) for number in part]
                builder.write_shard("rollouts", shard, pa.Table.from_pylist(rows, schema_for("rollouts")))
            return builder.commit(meta={"metrics": {"tokens": self.tokens}}, tables={"rollouts": SHARDS})

    def _row(self, number: int) -> dict[str, Any]:
        return {
            "sample_id": f"ab/1/{number}",
            "prompt_id": "ab",
            "sample_index": number,
            "prompt_token_ids": self.passages[number].prompt,
            "completion_token_ids": self.passages[number].completion,
            "sampling_logprobs": [-1.0] * COMPLETION,
            "behaviour": "student",
            "prefix_length": 0,
            "finish_reason": "stop",
            "seed": number,
            "completion_text": "",
            "reward": None,
        }

    def make(self, work: Work) -> dict[str, Artifact]:
        with ExitStack() as stack:
            builders = {name: stack.enter_context(self.store.building(spec)) for name, spec in work.outputs.items()}
            work.build(builders, self.context)
            return {name: builder.committed for name, builder in builders.items() if builder.committed is not None}

    def score(self, needs: Sequence[str], config: SuperviseConfig) -> Spent:
        """What was spent on one job that makes these signals; they are removed afterwards."""
        wanted = [SignalNeed(name, K if name == "teacher_topk" else None) for name in needs]
        work = supervise_work(
            config,
            Rollouts(self.rollouts),
            Student(self.student),
            Teacher(self.teacher),
            Prompts(self.prompts),
            wanted,
            RolloutConfig(top_p=0.9),
        )
        made = self.make(work)
        for artifact in made.values():
            shutil.rmtree(self.store.root / "artifacts" / artifact.stage / artifact.key)
        return self.pool.spent


def bare(models: Sequence[LoadedModel], passages: Sequence[Passage], scorer: Scorer, own: bool) -> Spent:
    """What is spent on the models' forwards over the same batches, with all logits; with `own`, by the scorer's product."""
    chunk = scorer.models.host.chunk_tokens
    before = Spent.now()
    with torch.inference_mode():
        for part in np.array_split(np.arange(len(passages)), SHARDS):
            for batch in plan_batches([PROMPT + COMPLETION - 1] * len(part), scorer.batch_tokens):
                for model in models:
                    hidden_ND = model.hidden([passages[part[index]] for index in batch])
                    for start in range(0, len(hidden_ND), chunk):
                        (model.logits if own else model.head)(hidden_ND[start : start + chunk])
    return Spent.now() - before


def rows_of(signals: str, tokens: int, found: dict[str, list[Spent]]) -> Iterator[list[str]]:
    """A row of the table for every way of scoring these signals; the scorer's is the last."""
    *_, ours = found.values()
    for name, spent in found.items():
        shown = [spread(ratios(spent, ours, kind)) if spent is not ours else "" for kind in ("cpu", "clock")]
        yield [signals, name, spread(1000 * one.cpu / tokens for one in spent), *shown]


def main(root: Path, options: argparse.Namespace) -> None:
    world = World(root, options.tokens, options.threads, options.spread)
    local, tokens = SuperviseConfig(), world.tokens
    everything, lists = ("sampled", "mask", "teacher_topk"), ("teacher_topk",)
    if options.profile:
        config, needs = (
            (SuperviseConfig(teacher=VllmTeacher()), lists) if options.profile == "vllm" else (local, everything)
        )
        world.score(needs, config)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            spent = world.score(needs, config)
        print(f"CPU {spent.cpu:.3g} s, of which in torch's operators:")
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))
        return
    print(machine(), flush=True)
    loaded = {name: LoadedModel(folder, "float32", torch.device("cpu")) for name, folder in world.folders.items()}

    def ways(models: Sequence[LoadedModel], needs: Sequence[str], config: SuperviseConfig) -> Ways:
        forwards = functools.partial(bare, models, world.passages, world.scorer)
        return {
            "bare": lambda: forwards(False),
            "bare, oneDNN": lambda: forwards(True),
            "scorer": lambda: world.score(needs, config),
        }

    compared: dict[str, Ways] = {}
    if options.only in (None, "all"):
        compared["all of both models"] = ways(list(loaded.values()), everything, local)
    if options.only in (None, "teacher"):
        compared["lists of the teacher"] = ways([loaded["teacher"]], lists, local)
        compared["all, student: none"] = ways([loaded["teacher"]], everything, SuperviseConfig(student="none"))
    if options.only in (None, "vllm"):
        ours, theirs = world.scorer, Scorer({"threads": options.threads})  # each keeps its model

        def vllm() -> Spent:
            world.pool.scorer = theirs
            spent = world.score(lists, SuperviseConfig(teacher=VllmTeacher()))
            world.pool.scorer = ours
            return spent

        compared["lists, beside vLLM"] = {"vLLM": vllm, **ways([loaded["teacher"]], lists, local)}
    rows: list[list[str]] = []
    for signals, each in compared.items():
        found = in_turns(each, options.turns)
        rows += rows_of(signals, tokens, found)
        for way, aim in (("bare", "at least 0.85"), ("bare, oneDNN", ""), ("vLLM", "at least 3")):
            if way in found:
                record(f"speed of scoring ({signals}), of {way}", ratios(found[way], found["scorer"]), aim)
    print(f"\n{tokens} tokens, logits of standard deviation {options.spread:g}\n")
    table(("signals", "way", "CPU ms per token", "its CPU time by the scorer's", "clock"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--spread", type=float, default=10.0)
    parser.add_argument(
        "--only", choices=("all", "teacher", "vllm"), help="one comparison; vllm: with its prompt_logprobs"
    )
    parser.add_argument("--profile", choices=("scorer", "vllm"), help="print where the time goes instead")
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), parser.parse_args())
