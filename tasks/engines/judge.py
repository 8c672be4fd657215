"""The judge: gives completions their rewards by verifiers, in a process of their own (verifier_process.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.disk.redact import redact
from storage.errors import OpdError
from storage.schemas import schema_for
from storage.store import Store
from tasks.engines.verifier_process import NoVerdict, VerifierProcess, reason_of
from tasks.inputs.judging import LATE_LEAST, JudgeConfig, Outcome, Unusable, kept_feedback, summed
from tasks.workers.jobs import JudgeJob, JudgeResult, ShardDone
from tasks.workers.main import Link

TABLE = "rewards"
SPLIT = "train"
HOPELESS = 10
"""Completions, one after another from a job's first on, that may end the verifiers' process before the job is given up."""
LATE_TOLD = 5
"""Completions at which a verifier is stopped at its limit, one after another, before the user is told."""


@dataclass(frozen=True)
class Prompt:
    """What a verifier may read of a prompt."""

    text: str
    answer: str | None


class Judge:
    """Serves JudgeJob (role judge). The verifiers' process stays between jobs of one config."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._process: VerifierProcess | None = None
        self._of: tuple[bytes, tuple[str | None, ...]] | None = None

    def handle(self, job: JudgeJob, link: Link) -> JudgeResult:
        """Judge shards until there are no more. OpdError where the verifiers cannot be started, or end their process at every
        completion."""
        store, process = Store(job.store), self._verifiers(job)
        rollouts = store.require(job.rollouts.stage, job.rollouts.key)
        writer = store.shard_writer(job.target.stage, job.target.key)
        prompts, given = read_prompts(store, job), process.given()
        texts = read_tokens(store, job) if any("tokens" in names for names in given) else {}
        judged = ended = 0
        lateness, ignored = Lateness(), Counter[str]()
        while (item := link.next()) is not None:
            rows = []
            for sample in samples_of(store.read_shard(rollouts, "rollouts", item.shard), prompts, texts):
                found = verdict(process, given, sample)
                rows.append(found.row)
                ignored.update(found.ignored)
                judged, ended = judged + (not found.ended), ended + found.ended
                if not judged and ended >= HOPELESS:
                    raise OpdError(
                        f"judge: the verifiers failed at each of the first {ended} completions and their process had to be ended"
                        f" every time, the last because {found.row['failed']}; nothing was judged"
                    )
                note = lateness.after(found.late)
                if note is not None:
                    print(note, flush=True)
                link.progress(judged + ended, 0, note=note)
            writer.write_shard(TABLE, item.shard, pa.Table.from_pylist(rows, schema=schema_for(TABLE)))
            link.done(ShardDone(item.shard, item.size))
        return JudgeResult(dict(ignored))

    def close(self) -> None:
        """End the verifiers' process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _verifiers(self, job: JudgeJob) -> VerifierProcess:
        wanted = (bytes(job.config), tuple(job.sources))
        if self._process is None or self._of != wanted:
            self.close()
            config = JudgeConfig.model_validate_json(bytes(job.config))
            self._process, self._of = VerifierProcess(config, job.sources), wanted
        return self._process


@dataclass
class Lateness:
    """The completions of a job at which a verifier was stopped at its limit. Each costs that many seconds."""

    running: int = 0
    """Late ones since the last that was answered in time."""

    def after(self, late: str | None) -> str | None:
        """Counts one more completion; `late`: the verifier that was stopped at it, and its limit. Returns what the user is to be
        told now: at the `LATE_TOLD`th late one after another, once for each such row of them. Whether the stage fails is decided
        over the whole round (`tasks/judge.py`), so that it depends on no order and no number of workers."""
        self.running = self.running + 1 if late else 0
        if self.running != LATE_TOLD:
            return None
        return (
            f"warning: the verifier {late} was stopped at its limit at {LATE_TOLD} completions one after another, and each waits"
            f" that long; raise judge.timeout if it needs more, or mend it. The stage fails at its end where more than half of a"
            f" round's completions ({LATE_LEAST} or more) have no reward for that"
        )


@dataclass(frozen=True)
class Verdict:
    """What the verifiers say about one sample."""

    row: dict[str, Any]
    """Of `rewards`."""
    ended: bool = False
    """Whether the sample has no reward because the verifiers' process had to be ended."""
    late: str | None = None
    """The verifier that was stopped at its limit, and the limit."""
    ignored: tuple[str, ...] = ()
    """Why verifiers of weight 0 gave no verdict."""


def verdict(process: VerifierProcess, given: list[list[str]], sample: Mapping[str, Any]) -> Verdict:
    """The sample's row of `rewards`. One verifier that fails leaves the sample without a reward, and the others are not asked; of
    one with weight 0 only the part is null."""
    row: dict[str, Any] = {"sample_id": sample["sample_id"]}
    outcomes: list[Outcome | None] = []
    late: str | None = None
    ignored: list[str] = []
    try:
        for place, names in enumerate(given):
            asked = {name: sample[name] for name in ("completion", "answer", "length", *names)}
            try:
                outcomes.append(process.ask(place, asked))
            except NoVerdict as error:
                if process.config.verifiers[place].weight:
                    raise
                outcomes.append(None)
                ignored.append(reason_of(str(error)))
            finally:
                late = process.late or late
        whole = summed(process.config, outcomes)
    except (NoVerdict, Unusable) as error:
        ended = isinstance(error, NoVerdict) and error.ended
        return Verdict(row | {"failed": reason_of(str(error))}, ended, late, tuple(ignored))
    starts, ends, kinds = ([span[at] for span in whole.spans or ()] for at in range(3))
    spans = {"span_starts": starts, "span_ends": ends, "span_kinds": [redact(str(kind)) for kind in kinds]}
    limit = process.config.max_feedback
    row |= {
        "reward": whole.reward,
        "parts": [None if outcome is None else outcome.reward for outcome in outcomes],
        "feedback": None if whole.feedback is None else kept_feedback(redact(whole.feedback), limit),
        "segment_ends": None if whole.segments is None else list(whole.segments),
        **(spans if whole.spans is not None else {}),
    }
    return Verdict(row, False, late, tuple(ignored))


def samples_of(rollouts: pa.Table, prompts: Mapping[str, Prompt], texts: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    """Each sample with what verifiers may be asked with. `texts`: of token ids, where a verifier asks for them."""
    columns = ("sample_id", "prompt_id", "completion_token_ids", "completion_text")
    for sample, prompt_id, ids, text in zip(*(rollouts[name].to_pylist() for name in columns), strict=True):
        prompt = prompts.get(prompt_id, Prompt("", None))
        yield {
            "sample_id": sample,
            "completion": text,
            "answer": prompt.answer,
            "prompt": prompt.text,
            "length": len(ids),
            "token_ids": ids,
            "tokens": [texts.get(index, "") for index in ids] if texts else [],
        }


def read_prompts(store: Store, job: JudgeJob) -> dict[str, Prompt]:
    """The training prompts by id."""
    table = store.read_table(
        store.require(job.prompts.stage, job.prompts.key), "prompts", columns=["prompt_id", "split", "text", "answer"]
    )
    table = table.filter(pc.equal(table["split"], SPLIT))
    return {row["prompt_id"]: Prompt(row["text"], row["answer"]) for row in table.to_pylist()}


def read_tokens(store: Store, job: JudgeJob) -> dict[int, str]:
    """The text of each of the student's token ids; of one that is no text alone its name in the vocabulary."""
    columns = ["tokenizer", "id", "token", "text"]
    table = store.read_table(store.require(job.prompts.stage, job.prompts.key), "vocabulary", columns=columns)
    table = table.filter(pc.equal(table["tokenizer"], "student"))
    texts = pc.coalesce(table["text"], table["token"])
    return dict(zip(table["id"].to_pylist(), texts.to_pylist(), strict=True))
