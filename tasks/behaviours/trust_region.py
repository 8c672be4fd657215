"""Trust-region blending (TRB, arXiv 2605.31159): tokens are drawn from a distribution between student and teacher, at most
`epsilon` from the student (tasks/losses/blending.py). Two samplers draw from it, and give the same distribution:

- lock-step: both models read every token, and one is drawn from mu;
- draft and verify: the student's engine drafts a block from p; both models score it in one pass; a token is accepted with
  min(1, mu(y) / p(y)); the first that is rejected is replaced by a draw from the positive part of mu - p, and drafting goes on
  behind it. A token is accepted with probability 1 - TV(mu, p) >= 1 - sqrt(epsilon / 2).

Ids that the two tokenizers read otherwise, or that the teacher lacks (the audit's unmapped ids), are no part of the teacher's
distribution: mu has none of them, except at positions where it is the student. The ids that end a completion for either model
are one category; an id that ends it for one and is an ordinary token of the other counts on the one's side only.

p in the acceptance is the scored student, so the rows are distributed as mu up to TV(p_draft, p_scored) per token, which the
artifact's metrics have (`draft_tv`)."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from storage.identity import derive_seed
from storage.schemas import Column, TableSchema
from tasks.behaviours import Behaviour, Completion, Draw, Drawn, Read, Score, Scored, Start, Stops, register
from tasks.behaviours.student import StudentWrites
from tasks.schedules import LinearSchedule

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS, _INTS = pa.list_(pa.float32()), pa.list_(pa.int32())
BLENDING = TableSchema(
    "blending",
    "How far the rollouts of a trust-region blend went from the student, per token.",
    (
        Column("sample_id", pa.string(), "prompt_id/round/sample_index"),
        Column("beta", _FLOATS, "T exponents of the teacher in mu; 0: the student, 1: the teacher"),
        Column("kl", _FLOATS, "T values of KL(mu || student) in nats, none above epsilon"),
        Column(
            "accepted_lengths",
            _INTS,
            "T numbers: how many drafted tokens were accepted in the block that the token is of; null in lock-step",
            nullable=True,
        ),
        Column("drafted", pa.int32(), "tokens that were drafted; null in lock-step", nullable=True),
        Column("accepted", pa.int32(), "of these, tokens that were accepted; null in lock-step", nullable=True),
        Column(
            "draft_excess",
            pa.float32(),
            "sum over compared drafted tokens of (1 - p_scored / p_draft)+, whose mean estimates TV(p_draft, p_scored)",
            nullable=True,
        ),
        Column(
            "compared", pa.int32(), "drafted tokens that were compared: those that end no completion", nullable=True
        ),
    ),
    prefixed=True,
)


@register
class TrustRegionBlending(Behaviour):
    """Draws every token from a blend of student and teacher that is at most epsilon from the student (TRB)."""

    kind: Literal["trb"] = "trb"
    equation: ClassVar[str] = "y_t ~ mu, mu ~ p^(1-b) q^b, b = max { b in [0,1] : KL(mu||p) <= epsilon }"
    paper: ClassVar[str] = "2605.31159"
    weighable: ClassVar[bool] = True
    table: ClassVar[TableSchema | None] = BLENDING

    epsilon: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="largest KL(mu || student) per token in nats; 0: the student alone"
    )
    anneal_steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps over which epsilon falls to 0 (linear); a round takes the value at its first step. null:"
        " epsilon stays",
    )
    start: int = Field(0, ge=0, description="the optimizer step, from 0, at which epsilon begins to fall")
    sampler: Literal["draft_and_verify", "lock_step"] = Field(
        "draft_and_verify",
        description="draft_and_verify: the student's engine drafts blocks, both models score them; lock_step: token by token."
        " The distribution is the same",
    )
    block: int = Field(16, ge=1, description="tokens of a drafted block")

    @property
    def label(self) -> Literal["student", "blended", "teacher"]:
        return "blended"

    @property
    def reads(self) -> frozenset[Read]:
        return frozenset({"teacher"})

    def at(self, step: int) -> Behaviour:
        """With this step's epsilon; at 0 the student writes."""
        epsilon = self.epsilon
        if self.anneal_steps is not None:
            epsilon = LinearSchedule(initial=epsilon, steps=self.anneal_steps, start=self.start).value(step)
        if epsilon == 0:
            return StudentWrites()
        block = {} if self.sampler == "draft_and_verify" else {"block": type(self).model_fields["block"].default}
        return self.model_copy(update={"epsilon": epsilon, "anneal_steps": None, "start": 0, **block})

    def problems(self, sampling: Any) -> list[str]:
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        given = {name: getattr(sampling, name) for name, value in plain.items() if getattr(sampling, name) != value}
        if not given or self.epsilon == 0:
            return []
        shown = ", ".join(f"rollout.{name} is {value}" for name, value in given.items())
        return [
            f"rollout.behaviour: trb blends the whole distributions of both models, but {shown}; set"
            f" {', '.join(f'rollout.{name}: {plain[name]:g}' for name in given)}"
        ]

    # --- where the models are ------------------------------------------------------------------------------------------

    def digest(self, student_NV: Tensor, teacher_NV: Tensor, stops: Stops) -> Mapping[str, Tensor]:
        """mu and the student (log-probabilities, the ids that end a completion merged onto the student's first), beta, KL, and
        `own`: the likeliest of the student's ids that end a completion. InputError where a model has no distribution."""
        from storage.errors import InputError
        from tasks.losses.blending import blend, without
        from tasks.losses.stop_ids import merge_scores

        for who, logprobs_NV in (("student", student_NV), ("teacher", teacher_NV)):
            if bool(logprobs_NV.isnan().any()):
                raise InputError(
                    f"rollout.behaviour: the {who}'s probabilities are NaN; check its weights and rollout.dtype"
                )
        own = [token for token in stops.student if token < student_NV.shape[-1]]
        best_N = student_NV[:, own].argmax(-1)
        unmapped, ends = {*stops.unmapped}, {*stops.student, *stops.teacher}
        ends_student = ends - (unmapped - {*stops.student})
        teacher_NV = without(teacher_NV, sorted(unmapped - {*stops.teacher}))
        student_NV = merge_scores(student_NV, [own[0], *sorted(ends_student - {own[0]})])
        teacher_NV = merge_scores(teacher_NV, [own[0], *sorted(ends - {own[0]})])
        beta_N, kl_N, mu_NV = blend(student_NV, teacher_NV, self.epsilon)
        return {"mu": mu_NV, "student": student_NV, "beta": beta_N, "kl": kl_N, "own": best_N.new_tensor(own)[best_N]}

    # --- one completion ------------------------------------------------------------------------------------------------

    def write(self, start: Start) -> Generator[Any, Any, Completion]:
        text = _Text(start)
        if self.sampler == "lock_step":
            while not text.ended:
                scored: Scored = yield Score(tuple(text.tokens), len(text.tokens))
                text.add(
                    scored.values, 0, _draw(scored.values["mu"][0].double().exp(), start.seed, "mu", len(text.tokens))
                )
            return text.completion()
        segment = drafted = accepted = compared = 0
        excess = 0.0
        lengths: list[int] = []
        while not text.ended:
            before = len(text.tokens)
            room = min(self.block, start.max_tokens - before)
            seed = derive_seed(start.seed, "draft", segment)
            draft: Drawn = yield Draw((*start.prompt, *text.tokens), room, seed, start.teacher_stop_ids)
            scored = yield Score((*text.tokens, *draft.token_ids[:-1]), before)
            kept, over, seen = self._verify(text, draft, scored.values)
            lengths += [kept] * (len(text.tokens) - before)
            drafted, accepted, segment = drafted + len(draft.token_ids), accepted + kept, segment + 1
            excess, compared = excess + over, compared + seen
        return text.completion(lengths, drafted, accepted, excess, compared)

    def _verify(self, text: _Text, draft: Drawn, values: Mapping[str, Tensor]) -> tuple[int, float, int]:
        """Add the accepted tokens of a draft, and the one that replaces the first rejected one. Returns (accepted tokens, sum of
        what the draft's probability has over the scored one, tokens so compared)."""
        from tasks.losses.blending import acceptance, residual

        ids = [text.stop if token in text.ends else token for token in draft.token_ids]
        index = values["mu"].new_tensor(ids).long()[:, None]
        mu, student = (values[name].gather(1, index)[:, 0].tolist() for name in ("mu", "student"))
        pairs = [(p, drawn) for y, p, drawn in zip(ids, student, draft.logprobs, strict=True) if y != text.stop]
        excess = sum(1 - acceptance(p, drawn) for p, drawn in pairs)
        for row, token in enumerate(ids):
            at = len(text.tokens)
            if uniform(text.seed, "accept", at) >= acceptance(mu[row], student[row]):
                weights = residual(values["mu"][row], values["student"][row])
                text.add(values, row, _draw(weights, text.seed, "residual", at))
                return row, excess, len(pairs)
            text.add(values, row, token)
        return len(ids), excess, len(pairs)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float | None]:
        """Means over tokens and the largest KL; acceptance: the share of tokens that are accepted drafts and no replacements,
        1 - TV(mu, p) on average; draft_used: the share of drafted tokens that were kept; draft_tv estimates
        TV(p_draft, p_scored)."""
        betas = [value for row in rows for value in row["beta"]]
        spent = [value for row in rows for value in row["kl"]]
        drafted, accepted, excess, compared = (
            sum(row[name] or 0 for row in rows) for name in ("drafted", "accepted", "draft_excess", "compared")
        )
        return {
            "beta_mean": sum(betas) / len(betas),
            "kl_mean": sum(spent) / len(spent),
            "kl_max": max(spent),
            "acceptance": accepted / len(betas) if drafted else None,
            "draft_used": accepted / drafted if drafted else None,
            "draft_tv": excess / compared if compared else None,
        }


class _Text:
    """A completion under way."""

    def __init__(self, start: Start) -> None:
        self.seed, self._limit = start.seed, start.max_tokens
        self.ends = frozenset(start.stop_ids) | frozenset(start.teacher_stop_ids)
        self.stop = min(start.stop_ids)
        """The id that stands for all that end a completion, as in `digest`."""
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._betas: list[float] = []
        self._kls: list[float] = []
        self._stopped = False

    @property
    def ended(self) -> bool:
        return self._stopped or len(self.tokens) >= self._limit

    def add(self, values: Mapping[str, Tensor], row: int, token: int) -> None:
        """Write a token that was drawn from this row of mu; of those that end a completion the student's own."""
        self._stopped = token == self.stop
        self.tokens.append(int(values["own"][row]) if self._stopped else token)
        self._logprobs.append(min(0.0, float(values["mu"][row, token])))
        self._betas.append(float(values["beta"][row]))
        self._kls.append(float(values["kl"][row]))

    def completion(
        self,
        lengths: list[int] | None = None,
        drafted: int | None = None,
        accepted: int | None = None,
        excess: float | None = None,
        compared: int | None = None,
    ) -> Completion:
        values = {
            "beta": self._betas,
            "kl": self._kls,
            "accepted_lengths": lengths,
            "drafted": drafted,
            "accepted": accepted,
            "draft_excess": excess,
            "compared": compared,
        }
        return Completion(self.tokens, self._logprobs, "stop" if self._stopped else "length", 0, values)


def uniform(seed: int, stream: str, position: int) -> float:
    """A number in [0, 1), of 53 bits, that depends on its arguments alone."""
    digest = hashlib.sha256(f"{seed}/{stream}/{position}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def _draw(weights: Tensor, seed: int, stream: str, position: int) -> int:
    from tasks.losses.blending import draw

    return draw(weights, uniform(seed, stream, position))
