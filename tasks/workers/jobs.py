"""The messages between supervisor and workers: roles, one schema per job, item and result, and the envelopes around them.

Both sides import this module. A message is one line of JSON, encoded and checked by msgspec: a field that is missing, unknown
or of another type is refused with its path (`JobMismatch`), and so is a worker or a plugin of another `PROTOCOL`.

A job names what it reads and writes by reference (`ArtifactRef`, `ModelRef`); rows never travel in messages. A job of a
sharded stage is open: the worker asks for items (`Want`), one shard each, until there are none, and reports each shard that
it has written (`Done`)."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, Union, dataclass_transform

import msgspec
from pydantic import BaseModel

from storage.errors import ConfigError, OpdError
from storage.store import Artifact, Store
from tasks.plugins import note_role
from tasks.rollout_config import Dtype

PROTOCOL = 5
"""Increased when a schema changes: a worker refuses a supervisor with another number."""


class JobMismatch(OpdError):
    """A message does not fit the schema of its kind, or comes from another protocol."""


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))  # subclasses inherit `frozen`
class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag=True):
    """Base of everything that is sent. Its name is its tag."""


# --- references ------------------------------------------------------------------------------------------------------


class ArtifactRef(Schema):
    """An artifact of the job's store, committed or (as a target) being built."""

    stage: str
    key: str

    @classmethod
    def of(cls, artifact: Artifact) -> ArtifactRef:
        return cls(artifact.stage, artifact.key)


class MemberRef(Schema):
    """One model of a mixture."""

    path: str
    weight: float


class ModelRef(Schema):
    """A model on local disk. `weights` and `architecture` are its content digests. An empty path: the job does not read it.
    A mixture has no path of its own but `members`, and `average` (logprobs or probs) says what of theirs is averaged."""

    path: str
    weights: str
    architecture: str
    members: list[MemberRef] | None = None
    average: str | None = None

    @classmethod
    def of(cls, store: Store, model: Artifact, read: bool = True) -> ModelRef:
        """A model of the store, its files verified; with `read` false only its digests."""
        digests = (model.content["weights"], model.content["architecture"])
        if model.stage != "mixture":
            return cls(str(store.materialize(model)) if read else "", *digests)
        parts = [(store.require(stage, key), weight) for stage, key, weight in model.meta["members"]]
        members = [MemberRef(str(store.materialize(part)) if read else "", weight) for part, weight in parts]
        return cls("", *digests, members=members, average=model.meta["average"])

    @property
    def paths(self) -> list[str]:
        """The folders that are read."""
        return [self.path] if self.members is None else [member.path for member in self.members]


# --- sampler ---------------------------------------------------------------------------------------------------------


class Sampling(Schema):
    """How tokens are drawn. top_k 0 and min_p 0 mean all tokens; temperature 0 the likeliest. `stop_token_ids`: ids, or "eos".
    `merged`: these are the stop ids of two models, the one that texts are written with first; the student may lack others."""

    temperature: float
    top_p: float
    top_k: int
    max_completion_length: int
    stop_token_ids: list[int] | str
    merged: bool = False
    min_p: float = 0.0


class Request(Schema, array_like=True):
    """One completion to sample, with its own seed."""

    sample_id: str
    prompt_id: str
    sample_index: int
    seed: int


class SampleShard(Schema):
    """Item: the completions of one shard, and which of the job's tables it lacks; null: `rollouts`."""

    shard: int
    sampling: Sampling
    requests: list[Request]
    tables: list[str] | None = None

    @property
    def size(self) -> int:
        return len(self.requests)


class SampleJob(Schema):
    """Sample completions of prompts (role sampler). Every shard becomes one of the table `rollouts` in the unfinished artifact
    `target`; with `intermediate` in its folder of intermediate shards, which no manifest names.

    `behaviour` is the JSON of who writes the tokens (tasks/behaviours), `values` where shards of its own table go, `teacher` the
    teacher and `drafts` the completions that it reads (an artifact with the table `drafts`, or prompts that have completions).
    `longest` is the length in tokens of the longest prompt with its completion, over all shards of the stage. `batch`
    repeats a recorded batch: item i is added at the engine's step `batch[i]`, and only the shards `write` are written."""

    store: str
    target: ArtifactRef
    prompts: ArtifactRef
    split: str
    model: ModelRef
    dtype: Dtype
    longest: int
    log_table: str
    """The table whose batches are recorded: the one that the stage commits."""
    intermediate: bool = False
    behaviour: msgspec.Raw = msgspec.Raw(b'{"kind":"student"}')
    values: ArtifactRef | None = None
    teacher: ModelRef | None = None
    drafts: ArtifactRef | None = None
    foreign: list[int] = []
    """Token ids that the student's tokenizer lacks or reads otherwise: a draft ends before the first of them."""
    unmapped: list[int] = []
    """Token ids that are another token to the teacher than to the student, or that one of them lacks."""
    table: str = "rollouts"
    """Table of the shards: `rollouts`, or one that has some of its columns."""
    reader: str = "student"
    """Whose tokens of the prompts are read: student or teacher."""
    batch: list[int] | None = None
    write: list[int] | None = None
    share: int | None = None
    """Samples that are a worker's share of the stage: its engine gets no further shard while it has as many."""


class SampleResult(Schema):
    """`proof`: how the engine's weights were checked (weight_proof.py). `stop_token_ids`: those that ended completions; null of
    a worker that got no shard."""

    stop_token_ids: list[int] | None
    proof: dict[str, str | int | float | bool | None]


# --- scorer ----------------------------------------------------------------------------------------------------------


class ScoringDistribution(Schema):
    """The sampling parameters of the rollouts that shape the distribution sampled from."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float = 0.0


class MaskRules(Schema):
    """Which tokens get which mask reason. unmapped: ids that the teacher's vocabulary lacks or reads otherwise; ids from
    `teacher_rows` on are unmapped too. special: ids; occurrence: all, or the first of each id in a completion."""

    unmapped: list[int]
    teacher_rows: int
    special: list[int]
    occurrence: str


class SignalOutput(Schema):
    """One signal to write. `k`, `encoding` and `tail_mass` apply to top-K lists."""

    table: str
    target: ArtifactRef
    k: int | None = None
    encoding: str = "exact"
    tail_mass: float | None = None


class ScoreShard(Schema):
    """Item: one shard of the rollouts, and the signals that it lacks."""

    shard: int
    size: int
    outputs: list[SignalOutput]


class ScoreJob(Schema):
    """Score rollouts under student and teacher (role scorer). Every item writes one shard of each of its outputs.

    `backend`: the JSON of the teacher's backend (tasks/engines/teacher.py). `flags`: a committed `sampled` that says which
    values are invalid, where only `mask` is wanted; then no model is read. `names`: the teacher's where there are several; only
    samples of prompts with one of these as their `teacher_id` are scored, and have rows. `stop_ids`: one category in every
    distribution, named by the first; empty: nothing is merged. `run_student`: `supervise.student`. `contexts`: what the teacher
    reads before each completion, in shards beside those of the rollouts; null, here or in a row: what it reads of the prompt."""

    store: str
    rollouts: ArtifactRef
    prompts: ArtifactRef
    student: ModelRef
    teacher: ModelRef
    dtype: Dtype
    sampling: ScoringDistribution
    backend: msgspec.Raw
    mask: MaskRules | None = None
    flags: ArtifactRef | None = None
    stop_ids: list[int] = []
    names: list[str] | None = None
    run_student: Literal["full", "none"] = "full"
    contexts: ArtifactRef | None = None


class KLShard(Schema):
    """Item: one intermediate shard of completions, to be scored."""

    shard: int
    size: int


class KLJob(Schema):
    """Exact reverse KL of sampled completions (role scorer): per intermediate shard `rollouts` of `target` one intermediate
    shard `completion_kl`. `stop_ids` as in `ScoreJob`."""

    store: str
    target: ArtifactRef
    prompts: ArtifactRef
    student: ModelRef
    teacher: ModelRef
    dtype: Dtype
    stop_ids: list[int] = []


class ShardDone(Schema):
    """Result of an item: its shard is written. `outside_nucleus`: sampled tokens that by the scorer's rounding lie just
    outside the set sampled from."""

    shard: int
    size: int
    outside_nucleus: int = 0


class ScoreResult(Schema):
    """A scorer's job has nothing to report beyond its shards."""


# --- judge -----------------------------------------------------------------------------------------------------------


class JudgeShard(Schema):
    """Item: one shard of the rollouts."""

    shard: int
    size: int


class JudgeJob(Schema):
    """Judge rollouts by verifiers (role judge). Every item writes one shard of the table `rewards`. `config`: the JSON of a
    JudgeConfig; `sources`: per verifier the digest of its function's file, or null."""

    store: str
    target: ArtifactRef
    rollouts: ArtifactRef
    prompts: ArtifactRef
    config: msgspec.Raw
    sources: list[str | None]


class JudgeResult(Schema):
    """`ignored`: why verifiers of weight 0 gave no verdict -> at how many completions."""

    ignored: dict[str, int] = {}


# --- harness ---------------------------------------------------------------------------------------------------------


class HarnessJob(Schema):
    """Run a task of lm-eval on a model (role harness) and write one shard of each of `tables`. `config`: the JSON of a
    HarnessConfig; `digest`: of the task; `folder`: tasks of the user's, or null."""

    store: str
    target: ArtifactRef
    model: ModelRef
    config: msgspec.Raw
    digest: str
    folder: str | None
    tables: list[str]


class HarnessResult(Schema):
    """A harness's job has nothing to report beyond its shards."""


# --- trainer ---------------------------------------------------------------------------------------------------------


class TrainOutputs(Schema):
    """Empty folders for student, trainer_state and teacher_ema, and the artifact of the table training_steps; null: not
    wanted."""

    student: str | None = None
    trainer_state: str | None = None
    steps: ArtifactRef | None = None
    teacher_ema: str | None = None


class CheckpointPlace(Schema):
    """Folder of the checkpoints inside the round, and the numerics at which one may be used (canonical JSON)."""

    folder: str
    numerics: msgspec.Raw


class WeightAverage(Schema):
    """The fields of `tasks.inputs.teachers.EmaStudent`."""

    decay: float
    per: Literal["round", "step"]


class TrainJob(Schema):
    """Train a student on rollouts and signals (role trainer; every rank gets the same job). `config` and `objective` are the
    JSON of a TrainConfig and of an objective; `state`: folder of the trainer state to continue from, or null. `signals`: by name
    the artifacts that hold it, one per teacher; each sample is in one of them. `prompts`: where there are several teachers,
    what says whose prompt each is. `stop_ids` as in `ScoreJob`. `average`: of the weights, which is kept for a teacher, or null.
    `judged`: the rewards, where the objective needs them. `contexts`: says which samples the teacher has read
    with a context, where they have contexts of their own."""

    store: str
    model: str
    seed: int
    round: int
    config: msgspec.Raw
    objective: msgspec.Raw
    outputs: TrainOutputs
    rollouts: ArtifactRef
    signals: dict[str, list[ArtifactRef]]
    state: str | None = None
    checkpoints: CheckpointPlace | None = None
    stop_ids: list[int] = []
    average: WeightAverage | None = None
    prompts: ArtifactRef | None = None
    contexts: ArtifactRef | None = None
    judged: ArtifactRef | None = None

    stage = "train"


class WarmupJob(Schema):
    """Supervised fine-tuning on the prompts' completions (role trainer). `config` is the JSON of a WarmupConfig. `teacher`: the
    name of the model where it is one of several teachers; it learns the rows that name it or none."""

    store: str
    model: str
    seed: int
    config: msgspec.Raw
    objective: msgspec.Raw
    outputs: TrainOutputs
    prompts: ArtifactRef
    checkpoints: CheckpointPlace | None = None
    teacher: str | None = None

    stage = "warmup"
    round = 0
    state = None
    average = None


class TrainResult(Schema):
    """Steps of this job, the last step of the run, and the metrics of the steps."""

    steps: int
    last_step: int
    metrics: dict[str, int | float | None]


# --- roles and the registry ------------------------------------------------------------------------------------------

ROLES: dict[str, str] = {
    "sampler": "tasks.engines.sampler:Sampler",
    "scorer": "tasks.engines.scorer:Scorer",
    "trainer": "tasks.trainer.trainer:Trainer",
    "judge": "tasks.engines.judge:Judge",
    "harness": "tasks.engines.harness:Harness",
}
"""Role -> "module:class" of the handler that serves its jobs in the worker process."""

_schemas: list[type[Schema]] = [
    SampleJob, ScoreJob, KLJob, JudgeJob, HarnessJob, TrainJob, WarmupJob,
    SampleShard, ScoreShard, KLShard, JudgeShard,
    SampleResult, ScoreResult, JudgeResult, HarnessResult, TrainResult, ShardDone,
]  # fmt: skip


def register_role(role: str, target: str) -> None:
    """Let `target` ("module:class") serve the jobs of a role. ConfigError for an unknown role."""
    if role not in ROLES:
        raise ConfigError(f"plugins: no role named {role!r}; there are {', '.join(ROLES)}")
    ROLES[role] = target
    note_role(role, target.partition(":")[0])


S = TypeVar("S", bound=Schema)
T = TypeVar("T")


def register_schema(schema: type[S]) -> type[S]:
    """Class decorator that lets both sides send a plugin's own job, item or result."""
    _schemas.append(schema)
    _decoders.clear()
    return schema


# --- messages --------------------------------------------------------------------------------------------------------


class Do(Schema):
    """To the worker: do a job. Its output goes to the file `log` from now on."""

    id: int
    protocol: int
    log: str
    job: msgspec.Raw


class Give(Schema):
    """To the worker: the next item of its job; null: there are no more."""

    id: int
    item: msgspec.Raw


class Rest(Schema):
    """To the worker, between two jobs: a training begins, which replaces the student. The worker frees what it holds of that one,
    and memory that it does not use."""


class Stop(Schema):
    """To the worker: end."""


class Ready(Schema):
    """From the worker: it can take jobs."""

    rank: int
    pid: int


class ErrorText(Schema):
    """An exception. `ours`: an OpdError, whose message is for the user."""

    kind: str
    message: str
    ours: bool
    traceback: str


class Failed(Schema):
    """From the worker: it could not start, or could not read a message."""

    rank: int
    error: ErrorText


class Progress(Schema):
    """From the worker: progress of a job, with the metrics known so far; a note is shown to the user."""

    id: int
    done: int
    total: int
    metrics: dict[str, int | float | None] | None = None
    note: str | None = None


class Want(Schema):
    """From the worker: it has room for another item."""

    id: int


class Done(Schema):
    """From the worker: an item is finished, its shard written."""

    id: int
    result: msgspec.Raw


class Result(Schema):
    """From the worker: a job is finished; `result` is null on ranks above 0."""

    id: int
    rank: int
    result: msgspec.Raw


class Error(Schema):
    """From the worker: a job failed."""

    id: int
    rank: int
    error: ErrorText


class Stopped(Schema):
    """From the worker: it ends now."""

    rank: int


ToWorker = Do | Give | Rest | Stop
FromWorker = Ready | Failed | Progress | Want | Done | Result | Error | Stopped
_to_worker: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)
_from_worker: msgspec.json.Decoder[FromWorker] = msgspec.json.Decoder(FromWorker)
_decoders: dict[str, msgspec.json.Decoder[Any]] = {}


def config_json(config: BaseModel) -> msgspec.Raw:
    """A config inside a job: its JSON, which its own model reads back."""
    return msgspec.Raw(config.model_dump_json().encode())


def line(message: ToWorker | FromWorker) -> bytes:
    """A message as a line of JSON."""
    return msgspec.json.encode(message) + b"\n"


def raw(value: Schema | None) -> msgspec.Raw:
    """A job, item or result (or null) inside a message: it is decoded on its own, so that an error names its field."""
    return msgspec.Raw(msgspec.json.encode(value))


def to_worker(data: bytes) -> ToWorker:
    """Decodes a message to a worker. JobMismatch when it fits no schema, with the protocol that the message names."""
    return _decode(_to_worker, data, "a message to the worker", _protocol_in(data))


def from_worker(data: bytes) -> FromWorker:
    """Decodes a message from a worker. JobMismatch when it fits no schema."""
    return _decode(_from_worker, data, "a message from the worker")


def decode(data: msgspec.Raw, protocol: int = PROTOCOL) -> Any:
    """The job, item or result (or None) in a message. JobMismatch names the field, what was found, and both protocols."""
    if "all" not in _decoders:
        _decoders["all"] = msgspec.json.Decoder(Union[(*_schemas, None)])
    value = _decode(_decoders["all"], bytes(data), "a job", protocol)
    if protocol != PROTOCOL:
        raise JobMismatch(
            f"a job was sent with protocol {protocol}, but is read with protocol {PROTOCOL}; supervisor, workers and plugins"
            " must be of one version of opdflow"
        )
    return value


def _protocol_in(data: bytes) -> int:
    try:
        return msgspec.json.decode(data, type=_Numbered).protocol
    except msgspec.DecodeError:
        return PROTOCOL


class _Numbered(msgspec.Struct):
    """What can be read of a message of any protocol."""

    protocol: int = PROTOCOL


def _decode(decoder: msgspec.json.Decoder[T], data: bytes, what: str, protocol: int = PROTOCOL) -> T:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise JobMismatch(
            f"{what} does not fit its schema: {error} (sent with protocol {protocol}, read with protocol {PROTOCOL});"
            " supervisor, workers and plugins must be of one version of opdflow"
        ) from error
