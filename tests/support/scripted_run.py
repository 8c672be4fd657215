"""A whole run with scripted engines (`tests/plugins/scripted_engines.py`), small enough to be killed hundreds of times.

Every call of `opd` here is a real process with its own session, forked from one that has imported the flow already, so that
a trial costs little more than its workers' starts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import forked
import numpy as np
import psutil
import pyarrow as pa
from places import PLUGINS
from safetensors.numpy import save_file
from small_models import Bench

from flows.experiment import Experiment
from storage.artifacts.artifact import MANIFEST
from storage.artifacts.builder import unfinished_work
from storage.artifacts.digests import table_digest
from storage.disk import failpoints
from storage.runs import Run
from storage.schemas import schema_for
from storage.store import Store
from tasks.inputs.addition import additions
from tasks.inputs.models import model_work
from tasks.inputs.tokenizers import build_byte_tokenizer
from tasks.plugins import load_plugins
from tasks.prepare import prepare_work

WITHOUT_PANDAS = Path(__file__).resolve().parent / "without_pandas"
NAME = "trial"
MARK = "OPD_FAULT_TRIAL"
OWN_PLUGINS = "OPD_FAULT_PLUGINS"
"""Environment variable: a folder of plugins of a trial's own."""
CLUSTER = "OPD_TEST_CLUSTER"
"""Environment variable: the address of a Ray cluster that a trial's workers are on."""
WARM = "OPD_TEST_WARM"
"""Environment variable: 1 where the cluster has room for the workers of all roles side by side."""
ROUNDS = 2
ROWS = 264

_ARCHITECTURE = {"model_type": "qwen3", "vocab_size": ROWS, "max_position_embeddings": 64}
EXPERIMENT: dict[str, Any] = {
    "teacher": {"source": {"kind": "architecture", "config": _ARCHITECTURE, "init_seed": 2}},
    "student": {"source": {"kind": "architecture", "config": _ARCHITECTURE, "init_seed": 1}},
    "prompts": {
        "train": {"kind": "addition", "digits": 2, "count": 8, "seed": 1},
        "eval": {"kind": "addition", "digits": 2, "count": 4, "seed": 2},
    },
    "rollout": {"prompts_per_round": 4, "num_generations": 2, "max_completion_length": 6, "shard_prompts": 2},
    "objective": {
        "estimator": "direct",
        "divergence": {"kind": "reverse_kl"},
        "support": {"kind": "teacher_topk", "k": 4, "outside": "bucket"},
    },
    "train": {"samples_per_step": 4, "lr": 1e-3},
    "evaluate": {"max_completion_length": 6, "verifier": {"kind": "exact_match", "extract": r"#(\d+)$"}},
    "runtime": {"device": "cpu", "threads": 1},
    "plugins": ["scripted_engines"],
}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drafts": {"rollout": {"behaviour": {"kind": "teacher_prefix", "cap": 3, "fraction": 0.5}}},
    "blended": {
        "teacher": {"source": {"kind": "ema", "per": "step"}},
        "rollout": {"top_p": 1.0, "behaviour": {"kind": "trb", "epsilon": 0.01}},
    },
    "judged": {
        "judge": {
            "verifiers": [
                {"kind": "function", "target": "judges:graded"},
                {"kind": "function", "target": "judges:moody", "weight": 0.5},
            ]
        },
        "objective": {"estimator": "policy_gradient", "advantage": {"kind": "grouped", "k": 4}},
        "plugins": ["scripted_engines", "extra_credits"],
    },
    "struck": {
        "judge": {"verifiers": [{"kind": "function", "target": "judges:struck"}], "timeout": 1},
        "objective": {"estimator": "policy_gradient", "advantage": {"kind": "grouped", "k": 4}},
        "plugins": ["scripted_engines", "extra_credits"],
    },
    "contexts": {
        "teacher": {"source": {"kind": "initial"}, "context": ["{prompt} {sibling}", "{prompt} ({verdict})"]},
        "judge": {"verifiers": [{"kind": "function", "target": "judges:parity"}]},
    },
    "pairs": {
        "teacher": {"source": {"kind": "initial"}, "context": "{answer} {prompt}"},
        "rollout": {"num_generations": 4, "behaviour": {"kind": "pairs", "drafts": {"per_prompt": 2}}},
        "objective": {"estimator": "pairs", "beta": 0.1},
    },
}
"""What a run has beside the plain one: drafts that the teacher writes once; a rollout of two artifacts (rollouts, blending) and
a teacher that the trainer averages and exports (`teacher_ema`); rewards, some of them null, which the trainer reads;
 contexts of samples, for which models have a real tokenizer; pairs of completions, one of which the teacher writes once below a
 context of the prompt, for which they have one too. `struck`: a verifier that does what OPD_TEST_JUDGE says."""


def experiment(rounds: int = ROUNDS, variant: str = "plain") -> Experiment:
    changes = VARIANTS[variant]
    load_plugins(changes.get("plugins", ()))
    rollout = EXPERIMENT["rollout"] | changes.get("rollout", {})
    return Experiment.model_validate(EXPERIMENT | changes | {"rollout": rollout, "policy": {"rounds": rounds}})


def prepare_root(root: Path, e: Experiment | None = None) -> Path:
    """A store with both models and the prompts, which need no fault of their own: no engine and no tokenizer is loaded."""
    store, e = Store(root), e or experiment()
    models = []
    own, writes = e.self_teacher is not None, "drafts" in e.rollout.behaviour.reads
    rendered = bool(
        e.sample_contexts or (writes and e.contexts)
    )  # contexts are read: by a stage, or by who writes drafts
    for number, side in enumerate((e.student,) if own else (e.student, e.teacher)):
        with store.building(model_work(side.source, e.seed).outputs["model"]) as builder:
            folder = builder.directory("model")
            save_file({"weight": np.full(2048, number, "float32")}, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(_ARCHITECTURE))
            (folder / "tokenizer.json").write_text(json.dumps({"byte": number * 0}))
            if rendered:
                build_byte_tokenizer().save_pretrained(folder)
            models.append(builder.commit(meta={"source": "architecture"}))
    if rendered:
        work = prepare_work(e.prompts, models[0], models[-1], contexts=e.contexts, context_columns=e.context_columns)
        Bench(store).build(work)
        return root
    rows = [
        {
            "prompt_id": f"{split}{index}",
            "split": split,
            "text": row["prompt"],
            "token_ids": list(row["prompt"].encode()),
            "answer": row["answer"],
        }
        for split, source in (("eval", e.prompts.eval), ("train", e.prompts.train))
        for index, row in enumerate(additions(source))
    ]
    prompts = pa.Table.from_pylist(rows, schema=schema_for("prompts"))
    words = [
        {"tokenizer": who, "id": i, "token": f"b{i}", "text": None, "special": i > 255}
        for who in ("student", "teacher")
        for i in range(261)
    ]
    both = (models[0], models[-1])
    with store.building(prepare_work(e.prompts, *both, contexts=e.contexts).outputs["prepare"]) as builder:
        builder.write_shard("prompts", 0, prompts)
        builder.write_shard("vocabulary", 0, pa.Table.from_pylist(words, schema=schema_for("vocabulary")))
        split = lambda name: table_digest(pa.Table.from_pylist([r for r in rows if r["split"] == name]))  # noqa: E731
        builder.commit(
            content={"prompts:train": split("train"), "prompts:eval": split("eval"), "audit": "0" * 64},
            meta={"audit": {"masked_ids": [], "teacher": {"rows": ROWS}}},
            tables={"prompts": 1, "vocabulary": 1},
        )
    return root


# --- processes -------------------------------------------------------------------------------------------------------


def find_engines() -> None:
    """Makes the plugin importable in this process and its workers, and what lies in the trial's own folder of plugins."""
    places = [str(PLUGINS), *filter(None, [os.environ.get(OWN_PLUGINS)])]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(WITHOUT_PANDAS), *places])
    sys.path[:0] = places


def _main(root: str, rounds: int, variant: str, environment: dict[str, str]) -> None:
    """What `opd run` (and `opd resume`, which reads the same config from the run) does."""
    os.environ.update(environment)
    find_engines()
    failpoints.arm()
    from flows.cli.errors import exit_codes
    from flows.run.runner import resume_experiment, run_experiment

    with exit_codes():
        started = (Path(root) / "runs" / NAME / "state.json").exists()
        e = resume_experiment(NAME, root, [f"policy.rounds={rounds}"]) if started else experiment(rounds, variant)
        if address := os.environ.get(CLUSTER):
            on_ray = {"cluster": {"kind": "ray", "address": address}, "keep_warm": os.environ.get(WARM) == "1"}
            runtime = type(e.runtime).model_validate(e.runtime.model_dump() | on_ray)
            e = e.model_copy(update={"runtime": runtime})
        run_experiment(e, name=NAME, root=root, prefect=False)
    sys.stdout.flush()


@dataclass
class Trial:
    """One store and the processes that work on it."""

    folder: Path
    temporary: Path
    """The processes' folder for temporary files: short, for a socket's path must fit into 107 characters."""
    rounds: int = ROUNDS
    variant: str = "plain"
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables of its processes."""

    @property
    def root(self) -> Path:
        return self.folder / "store"

    @property
    def output(self) -> str:
        path = self.folder / "output"
        return path.read_text() if path.exists() else ""

    @classmethod
    def of(cls, template: Path, folder: Path, rounds: int = ROUNDS, variant: str = "plain", **environment: str) -> Self:
        folder.mkdir(parents=True)
        shutil.copytree(template, folder / "store")
        return cls(folder, Path(tempfile.mkdtemp(prefix="opd-trial-")), rounds, variant, environment)

    def remove(self) -> None:
        shutil.rmtree(self.folder)
        shutil.rmtree(self.temporary)

    def start(self, failpoint: str = "", log: bool = False) -> Any:
        """A process that brings the run to its end, unless something happens to it."""
        environment = {MARK: str(self.folder), "TMPDIR": str(self.temporary), failpoints.SPEC: failpoint}
        environment |= self.environment
        if failpoint or log:
            environment[failpoints.LOG] = str(self.folder / "hits")
        return forked.start(
            _main, str(self.root), self.rounds, self.variant, environment, output=self.folder / "output"
        )

    def run(self, failpoint: str = "", log: bool = False) -> int:
        """Its exit code; -9 where it was killed."""
        return forked.exit_code(self.start(failpoint, log))

    def kill(self, process: Any) -> None:
        """SIGKILL to the whole tree."""
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(process.pid).children(recursive=True)
            for pid in (process.pid, *(child.pid for child in tree)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        forked.exit_code(process)

    def processes(self) -> list[psutil.Process]:
        """Everything alive that belongs to this trial, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def orphans(self, patience: float = 10.0) -> list[psutil.Process]:
        """Those that are still alive after that many seconds."""
        deadline = time.monotonic() + patience
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def leftovers(self) -> list[str]:
        """Temporary files, in the store and in the folder for temporary files; and what unfinished artifacts keep where nobody
        needs it: beside a manifest, or anywhere once the run has ended."""
        found = [*self.root.rglob(".tmp-*"), *self.temporary.iterdir()]
        runs = [run for run in Run.list(self.root) if run.name == NAME]
        ended = any(run.state.status == "finished" for run in runs)
        for path in unfinished_work(self.root / "artifacts", "*/*/"):
            if ended or (path.parent / MANIFEST).exists():
                found.append(path)
        return sorted(map(str, found))

    def hits(self) -> list[str]:
        """Names of the failpoints met, in order, by all processes."""
        path = self.folder / "hits"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def result(self) -> dict[str, Any]:
        """All that must not depend on what happened on the way: students, metrics, contents, samples used."""
        store, state = Store(self.root), Run.open(self.root, NAME).state
        artifacts = store.list()
        used: list[Any] = []
        for artifact in artifacts:
            assert store.verify(artifact, move=False) == []
            if artifact.stage == "trainer_state" and artifact.meta["last_step"] > len(used):
                used = json.loads((store.materialize(artifact, "state") / "used.json").read_text())
        return {
            "status": state.status,
            "students": {str(r.round): r.student_sha256 for r in state.rounds},
            "metrics": {str(r.round): r.metrics for r in state.rounds},
            "contents": {f"{a.stage}/{a.key}": a.content for a in artifacts},
            "used": used,
        }
