"""`mask`: reasons to leave tokens out of the loss. Which of them do is decided in training (`train.mask_reasons`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from storage.errors import InputError
from storage.identity import Identity
from storage.schemas import TABLES, MaskReason
from storage.store import Artifact, Store
from tasks.signals.sampled import COLUMNS, sampled_table
from tasks.signals.signal import Inputs, Shard, Signal, Written, register
from tasks.signals.tables import arrays_of, check_lengths, lists, rows_of, usable_entropies, usable_logprobs
from tasks.signals.wanted import Ask, Wanted


class SpecialTokens(Identity):
    """Which completion tokens get the mask reason SPECIAL_TOKEN. Whether it masks them is decided by `train`."""

    mark: Literal["differing", "all"] = Field(
        "differing",
        description="differing: special tokens that mean something else to the teacher, by the tokenizer audit; all:"
        " every special token (without supervision of a matching end of sequence completions run away)",
    )
    tokens: tuple[str, ...] = Field((), description="further tokens, by name or text (<, think)")
    occurrence: Literal["all", "first"] = Field(
        "all", description="every occurrence, or the first of each token in a completion (Revisiting OPD)"
    )


@register
class Mask(Signal):
    """Per token the reasons to leave it out: special token, truncated, written by the teacher, unmapped in the teacher's
    vocabulary, invalid value. Depends on both models because their invalid values are marked; without one of them
    on the other, whose values and the sampler's then decide."""

    name = "mask"
    schema = TABLES[name]
    prompt_parts = ("audit", "vocabulary")
    checked = ("mask_reasons",)
    without_student = without_teacher = True

    def wanted(self, k: int | None, sampling: Mapping[str, Any]) -> Wanted:
        return Wanted(Ask(logprobs=True, entropy=True), Ask(logprobs=True, entropy=True))

    def identity(self, inputs: Inputs, k: int | None) -> dict[str, Any]:
        return {"special_tokens": inputs.settings.special_tokens}

    def table(self, shard: Shard) -> pa.Table:
        flags = sampled_table(shard.rollouts, shard.values) if shard.flags is None else shard.flags
        return mask_table(shard.rollouts, flags, shard.rules)

    def meta(self, written: Written) -> dict[str, Any]:
        """`reasons`: tokens by reason; `tokens`: all of them."""
        reasons = pc.list_flatten(written.read("mask_reasons"))
        counts = {
            (reason.name or "").lower(): pc.sum(pc.not_equal(pc.bit_wise_and(reasons, int(reason)), 0)).as_py() or 0
            for reason in MaskReason
        }
        return {"reasons": counts, "tokens": len(reasons), "metrics": {"invalid_tokens": counts["invalid_value"]}}

    def unusable(self, rows: pa.Table) -> tuple[int, int]:
        """Tokens marked INVALID_VALUE and not UNMAPPED."""
        both = int(MaskReason.INVALID_VALUE | MaskReason.UNMAPPED)
        reasons = pc.bit_wise_and(pc.list_flatten(rows["mask_reasons"]), both)
        return pc.sum(pc.equal(reasons, int(MaskReason.INVALID_VALUE))).as_py() or 0, len(reasons)


def mask_rules(
    store: Store, prompts: Artifact, special_tokens: SpecialTokens, teacher: str | None = None
) -> dict[str, Any]:
    """The rules of `mask_table`, from the tokenizers' audit and vocabularies in the `prepare` artifact. `teacher`: whose, where
    there are several.

    Raises InputError for a token that the student's tokenizer does not have, or prompts prepared without a teacher."""
    audit = prompts.meta.get("audit") if teacher is None else (prompts.meta.get("audits") or {}).get(teacher)
    if audit is None:
        raise InputError(
            f"prepare/{prompts.key}: its prompts were prepared without a teacher, so no tokens were compared"
        )
    vocabulary = store.read_table(prompts, "vocabulary", columns=["tokenizer", "id", "token", "text", "special"])
    if teacher is not None:
        both = pa.array(["student", f"teacher:{teacher}"])
        vocabulary = vocabulary.filter(pc.is_in(vocabulary["tokenizer"], value_set=both))
    special = set(vocabulary.filter(vocabulary["special"])["id"].to_pylist())
    unmapped = set(audit["masked_ids"])
    marked = special if special_tokens.mark == "all" else special & unmapped
    own = vocabulary.filter(pc.equal(vocabulary["tokenizer"], "student"))
    for name in special_tokens.tokens:
        marked = marked | _ids_of(name, own)
    return {
        "unmapped": sorted(unmapped),
        "teacher_rows": audit["teacher"]["rows"],
        "special": sorted(marked),
        "occurrence": special_tokens.occurrence,
    }


def _ids_of(name: str, vocabulary: pa.Table) -> set[int]:
    columns = (vocabulary[column].to_pylist() for column in ("id", "token", "text"))
    rows = list(zip(*columns, strict=True))
    found = {index for index, token, text in rows if name in (token, text)}
    if not found:
        near = difflib.get_close_matches(name, [token for _, token, _ in rows], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"supervise.special_tokens.tokens: the student's tokenizer has no token {name!r}{hint}")
    return found


def mask_table(rollouts: pa.Table, sampled: pa.Table, rules: Mapping[str, Any]) -> pa.Table:
    """Rows of `mask`. `rules`: unmapped (ids that the teacher's vocabulary lacks or reads otherwise), teacher_rows (ids
    from there on are unmapped too), special (ids), occurrence (all, or the first of each id in a completion)."""
    unmapped = np.array(sorted(rules["unmapped"]), np.int64)
    special = np.array(sorted(rules["special"]), np.int64)
    reasons = []
    rows = zip(
        arrays_of(rollouts["completion_token_ids"]),
        rollouts["prefix_length"].to_pylist(),
        rollouts["finish_reason"].to_pylist(),
        invalid_tokens(rollouts, sampled),
        strict=True,
    )
    for completion, prefix_length, finish_reason, invalid in rows:
        ids = np.asarray(completion, np.int64)
        found = np.zeros(len(ids), np.int32)
        is_special = np.isin(ids, special)
        if rules["occurrence"] == "first":
            first = np.zeros(len(ids), bool)
            first[np.unique(ids, return_index=True)[1]] = True
            is_special &= first
        found[is_special] |= int(MaskReason.SPECIAL_TOKEN)
        found[np.isin(ids, unmapped) | (ids >= rules["teacher_rows"])] |= int(MaskReason.UNMAPPED)
        if finish_reason == "length":
            found |= int(MaskReason.TRUNCATED)
        found[:prefix_length] |= int(MaskReason.TEACHER_PREFIX)
        found[invalid] |= int(MaskReason.INVALID_VALUE)
        reasons.append(found)
    return rows_of(TABLES["mask"], rollouts, {"mask_reasons": lists(reasons, pa.int32())})


def invalid_tokens(rollouts: pa.Table, sampled: pa.Table) -> list[np.ndarray]:
    """Per sample the tokens (T, bool) where a model or the sampler gave no usable log-probability, or a model no usable
    entropy. Null lists (of a student that was not run, say) do not count. Raises InputError by sample for a list not as long as
    its completion."""
    columns = {f"sampled.{name}": arrays_of(sampled[name]) for name in COLUMNS}
    columns["rollouts.sampling_logprobs"] = arrays_of(rollouts["sampling_logprobs"])
    check_lengths(rollouts, columns)
    checks = [usable_entropies if name.endswith("entropy") else usable_logprobs for name in columns]
    found = []
    for values in zip(*columns.values(), strict=True):
        pairs = zip(checks, values, strict=True)
        usable = [check(value.astype(np.float64)) for check, value in pairs if value is not None]
        found.append(~np.all(usable, axis=0))
    return found
