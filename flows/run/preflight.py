"""What can be known about a run before an engine starts. `opd check` reports all of it; a run does the same checks before its
first stage that needs a worker.

A check is a function from `Known` to the texts of what it found. A plugin that serves a role itself is not checked for it."""

from __future__ import annotations

from collections.abc import Callable

from flows.run import engine_checks, machine_checks, model_checks, prompt_checks
from flows.run.checked import Finding, Found, Known, ours
from storage.errors import InputError
from tasks.workers import jobs

CHECKS: tuple[tuple[Callable[[Known], Found], str], ...] = (
    (machine_checks.installed, "sampler"),
    (machine_checks.teacher_server, "scorer"),
    (machine_checks.programs, "sampler"),
    (machine_checks.beside_sampler, "sampler"),
    (engine_checks.spread, "sampler"),
    (engine_checks.over_nodes, "sampler"),
    (machine_checks.deepspeed_file, "trainer"),
    (model_checks.architecture, "scorer"),
    (model_checks.weights, "scorer"),
    (model_checks.engine, "sampler"),
    (model_checks.head_size, "sampler"),
    (model_checks.dropout, "trainer"),
    (model_checks.adapters, "trainer"),
    (model_checks.export, "trainer"),
    (prompt_checks.sizes, "sampler"),
    (prompt_checks.evaluation_sets, "sampler"),
    (prompt_checks.warm_ups, "trainer"),
    (prompt_checks.prompts_of_each, "scorer"),
    (prompt_checks.stop_ids, "sampler"),
    (prompt_checks.lengths, "sampler"),
    (prompt_checks.ids_within_rows, "scorer"),
    (prompt_checks.given_completions, "sampler"),
    (prompt_checks.self_teacher, "scorer"),
    (prompt_checks.sample_contexts, "scorer"),
    (prompt_checks.entropies, "scorer"),
    (prompt_checks.answers, "judge"),
)
"""Every check, with the role that it is about."""


def any_check() -> bool:
    """Whether an engine of this program serves a role, so that there is something to check."""
    return any(ours(role) for role in jobs.ROLES if role != "judge")


def findings(known: Known) -> list[Finding]:
    """What all checks found."""
    return [finding for check, role in CHECKS if ours(role) for finding in check(known)]


def require(found: list[Finding]) -> None:
    """InputError with every finding that refuses the run."""
    if refused := [finding.text for finding in found if finding.refused]:
        raise InputError("\n".join(refused))


def preflight(known: Known, say: Callable[[str], None]) -> None:
    """All checks; what refuses nothing is said. InputError with everything that refuses the run."""
    found = findings(known)
    for finding in found:
        if not finding.refused:
            say(finding.text)
    require(found)
