"""Another evaluation set for a run that exists (`opd evaluate NAME --prompts`): read and checked before anything starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from flows.distill import FurtherSet, set_label
from flows.experiment import Experiment, as_stored, experiment_of, overridden
from storage.errors import ConfigError, CorruptArtifact, InputError
from storage.identity import canonical_json
from storage.runs import Run
from storage.store import Store
from tasks.evaluate import EvaluationSet
from tasks.inputs.sources import read_rows, source_identity
from tasks.inputs.verifiers import FunctionVerifier, function_place

VERIFIERS = {
    "exact_match": ("extract", "exact_match[:REGEX]"),
    "math_verify": ("timeout", "math_verify[:SECONDS]"),
    "function": ("target", "function:MODULE:FUNCTION"),
}
"""By kind: the field that ARG gives, and how it is written."""


def parse_verifier(text: str) -> dict[str, Any] | None:
    """KIND[:ARG] as a config's verifier; `none` as null. ConfigError for another kind."""
    kind, colon, argument = text.partition(":")
    if text == "none":
        return None
    if kind not in VERIFIERS:
        known = ", ".join(form for _, form in VERIFIERS.values())
        raise ConfigError(f"--verifier {text!r}: unknown kind {kind!r}; write {known}, or none")
    field = VERIFIERS[kind][0]
    if kind == "function" and not colon:
        raise ConfigError(f"--verifier {text!r}: write {VERIFIERS[kind][1]}")
    value: Any = argument
    if kind == "math_verify" and colon:
        try:
            value = float(argument)
        except ValueError:
            raise ConfigError(f"--verifier {text!r}: {argument!r} is not a number of seconds") from None
    return {"kind": kind} | ({field: value} if colon else {})


def further_set(
    run: Run, experiment: Experiment, name: str, prompts: str, verifier: str | None, limit: int | None, rounds: Sequence[int]
) -> FurtherSet:  # fmt: skip
    """The set, checked: its name is free, its rows can be read, the verifier has what it needs.

    `prompts`: a file or folder, or a mapping as prompts.eval has it. `verifier`: KIND[:ARG]; None: the run's own.
    Raises ConfigError or InputError."""
    if name in experiment.evaluate.sets:
        raise InputError(
            f"--set-name {name}: run {run.name!r} has a set of this name in its config; choose another name"
        )
    own = experiment.evaluate.verifier
    judge = parse_verifier(verifier) if verifier is not None else None if own is None else own.model_dump(mode="json")
    source = prompts if prompts.lstrip().startswith("{") else json.dumps({"kind": "file", "path": prompts})
    fields = {"prompts": source, "verifier": json.dumps(judge), "limit": json.dumps(limit)}
    given = [f'evaluate.sets."{name}".{field}={value}' for field, value in fields.items()]
    data = overridden(as_stored(run.experiment), given)
    one = experiment_of(data, f"--prompts {prompts} of set {name}").evaluate.sets[name]
    check_rows(one, f"--prompts {prompts}")
    _refuse_others(run, experiment, name, one)
    return FurtherSet(name, one, tuple(rounds))


def check_rows(one: EvaluationSet, where: str) -> str:
    """A line about the set's rows and verifier. InputError or ConfigError where they cannot be read, or where a row has no answer
    that the verifier needs; `where` names the prompts."""
    rows, _ = read_rows(one.prompts)
    if isinstance(one.verifier, FunctionVerifier):
        function_place(one.verifier)
    elif one.verifier is not None and (without := [row.where for row in rows if row.answer is None]):
        raise InputError(
            f"{where}: {len(without):,} of {len(rows):,} rows have no answer (the first: {without[0]}), which the verifier"
            f" {one.verifier.kind} needs; add a column answer, name it ({{path: FILE, columns: {{answer: NAME}}}}), or take no"
            " verifier"
        )
    return f"{where}: {len(rows):,} rows; verifier: {'none' if one.verifier is None else one.verifier.kind}"


def _refuse_others(run: Run, experiment: Experiment, name: str, one: EvaluationSet) -> None:
    """InputError where the run has another set of this name: its rounds would not be comparable."""
    store = Store(run.directory.parent.parent)
    wanted = {
        "prepare": ("eval", source_identity(one.prompts, store.memo), "other prompts"),
        "evaluate": ("config", json.loads(canonical_json(experiment.evaluate.on(one))), "another verifier or limit"),
    }
    for round in run.state.rounds:
        for stage, (field, value, what) in wanted.items():
            record = round.stages.get(set_label(stage, name))
            key = None if record is None else record.artifacts.get(stage)
            try:
                made = None if key is None else store.get(stage, key)
            except CorruptArtifact:
                continue
            if made is not None and made.identity.get(field) != value:
                raise InputError(
                    f"--set-name {name}: run {run.name!r} has a set of this name with {what} (round {round.round}); choose"
                    " another name"
                )
