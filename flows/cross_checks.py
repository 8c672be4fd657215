"""Combinations of fields that do not fit together, each with what to do. Checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flows.config_file import DISCRIMINATORS
from storage.errors import ConfigError
from storage.query.figures import PARTS
from tasks.engines.teacher import ServerTeacher
from tasks.inputs.addition import AdditionSource
from tasks.inputs.contexts import JUDGED, SiblingConfig, named_in, templates_of
from tasks.inputs.judging import JudgeConfig, JudgeFunction
from tasks.inputs.models import CheckpointModel, ServedModel, declared_sizes
from tasks.inputs.teachers import SELF_TEACHERS, InitialStudent, is_self
from tasks.losses.config import AnyObjective, FullSupport
from tasks.losses.token_credit.readers import without_effect as unread_fields
from tasks.routing import NAME, teacher_field
from tasks.supervise import signal_problems

if TYPE_CHECKING:
    from flows.experiment import Experiment, TeacherConfig


def cross_problems(e: Experiment) -> list[str]:
    """Invalid combinations of fields, each with what to do. Checked before anything starts."""
    problems: list[str] = []
    samples = e.rollout.prompts_per_round * e.rollout.num_generations * e.train.epochs_per_round
    if samples % e.train.samples_per_step:
        problems.append(
            f"train.samples_per_step: {e.train.samples_per_step} does not divide the {samples} samples of a round"
            " (rollout.prompts_per_round x rollout.num_generations x train.epochs_per_round)"
        )
    if e.objective.estimator == "sft":
        problems.append("objective.estimator: 'sft' trains on given text and belongs to student.warmup; choose another")
    if e.judge is None and e.objective.needs().credit.reward:
        problems.append(
            "judge: this objective needs a reward of each completion, and nothing gives one; write judge: {verifiers: [{kind:"
            " exact_match}]} (or math_verify, or {kind: function, target: MODULE:FUNCTION}), or take an objective that needs"
            " none (`opd objectives` lists them)"
        )
    truncated = [
        f"rollout.{name} is {value}"
        for name, value, plain in (
            ("top_p", e.rollout.top_p, 1.0),
            ("top_k", e.rollout.top_k or 0, 0),
            ("min_p", e.rollout.min_p, 0),
            ("temperature", e.rollout.temperature, 1.0),
        )
        if value != plain
    ]
    problems += sampling_problems(e, truncated)
    problems += _stop_problems(e)
    problems += prefix_problems(e)
    problems += teacher_problems(e)
    problems += credit_problems(e)
    problems += pair_problems(e)
    problems += _set_problems(e)
    for name, model in (("student", e.student), *((teacher_field(who), model) for who, model in e.taught_by.items())):
        if model.warmup is not None and e.prompts.warmup is None:
            problems.append(f"{name}.warmup: needs prompts.warmup (prompts with a `completion` to learn)")
    problems += signal_problems(e.supervise, e.objective.needs().signals)
    problems += teacherless_problems(e)
    problems += cut_problems(e)
    problems += student_problems(e)
    problems += served_problems(e)
    sizes = (declared_sizes(e.source_of(model))[0] for model in e.taught_by.values())
    problems += size_problems(e, *declared_sizes(e.student.source), *sizes)
    return problems


def credit_problems(e: Experiment) -> list[str]:
    """What rewards and token credit ask of the rollouts and of the teacher."""
    if e.objective.estimator != "credit":
        return []
    problems, needs = [], e.objective.needs().credit
    if needs.reward and e.rollout.num_generations < 2:
        problems.append(
            "rollout.num_generations: 1, but objective.reward group compares the samples of a prompt with each other; set it to 2"
            " or more (8 is usual)"
        )
    threshold = e.objective.reward.threshold
    judged = None if e.judge is None else e.judge.success_threshold
    if threshold is not None and judged is not None and threshold != judged:
        problems.append(
            f"objective.reward.success_threshold: {threshold:g}, but judge.success_threshold, by which {{sibling}} is correct, is"
            f" {judged:g}; give both the same"
        )
    marks = {"route: spans": ("spans", needs.spans), "add.segments_of: judge": ("segments", needs.judged_segments)}
    for field, (key, asked) in marks.items():
        if asked and e.judge is not None and not any(isinstance(v, JudgeFunction) for v in e.judge.verifiers):
            problems.append(
                f"objective.{field} reads the judge's {key}, but {' and '.join(e.judge.names)} give"
                f"{'s' * (len(e.judge.names) == 1)} none; add a function of yours that returns {{reward, {key}}} to"
                " judge.verifiers (docs/rewards.md)"
            )
    if needs.contexts and (lacking := [name for name, model in e.teachers.items() if model.context is None]):
        problems.append(
            f"teachers.{lacking[0]}.context: the objective asks which samples the teacher reads a context for, and this one has"
            ' none; give a template, for example "{prompt}\n{solution}"'
        )
    if needs.contexts and not e.teachers and (e.teacher is None or e.teacher.context is None):
        problems.append(
            "teacher.context: the objective asks which samples the teacher reads a context for, and there is none; give a"
            ' template, for example "{prompt}\n{solution}"'
        )
    return problems


def without_effect(e: Experiment) -> list[str]:
    """Fields of the objective that nothing reads. Refused in configs and not in stored runs, which earlier versions accepted."""
    objective = e.objective
    if objective.estimator != "credit":
        return []
    found = list(unread_fields(objective))
    reference = objective.reference
    if reference is not None and reference.to == "rollout" and e.steps_per_round == 1:
        found.append(
            "objective.reference.to: rollout, but a round has one optimizer step, at which the student is the one that wrote the"
            " rollouts, so the penalty and its gradient are 0; lower train.samples_per_step, or set it to teacher"
        )
    return found


def pair_problems(e: Experiment) -> list[str]:
    """What an objective that compares the teacher's completions with the student's asks of the rollouts, the teacher and the
    training."""
    if not e.objective.needs().pairs:
        return []
    problems, behaviour, name = [], e.rollout.behaviour, e.objective.estimator
    if not behaviour.pairs:
        problems.append(
            f"rollout.behaviour: {behaviour.kind!r} writes no completion of the teacher for each of the student's, which"
            f" objective.estimator {name} compares; set rollout.behaviour: pairs, and an even rollout.num_generations (2 or more)"
        )
    if e.train.samples_per_step % 2:
        problems.append(
            f"train.samples_per_step: {e.train.samples_per_step} is odd, but the two completions of a pair are in one optimizer"
            " step; use an even number"
        )
    if (correction := e.train.importance_correction.kind) != "none":
        problems.append(
            f"train.importance_correction: {correction} weights single tokens of the student's, and objective.estimator {name}"
            " compares whole completions, one of which the teacher wrote; set kind: none"
        )
    if e.train.max_drift is not None:
        problems.append(
            f"train.max_drift: the drift is measured on the student's own samples, and half of the tokens of objective.estimator"
            f" {name} are the teacher's; leave it out"
        )
    if e.teacher is None:
        return problems
    if e.sample_contexts:
        problems.append(
            f"teacher.context: with rollout.behaviour {behaviour.kind} the teacher writes before the round, so it cannot read"
            " what is chosen for each sample afterwards; give one template over {prompt}, {answer}, {solution} and {hint}"
        )
    elif is_self(e.teacher.source) and e.teacher.context is None and isinstance(e.prompts.train, AdditionSource):
        problems.append(
            f"teacher.context: missing, but teacher.source {e.teacher.source.kind} is the student itself, so without one both"
            " write and score alike and there is nothing to compare; give a template, for example"
            ' "{solution}\\n{prompt}", or another teacher'
        )
    return problems


def needs_judge(e: Experiment) -> bool:
    """Whether something reads rewards or feedback of the rollouts, so that the stage `judge` runs."""
    return e.objective.needs().credit.reward or bool(named_in(e.sample_contexts) & JUDGED)


def reads_entropy(objective: AnyObjective) -> bool:
    """Whether the loss depends on the teacher's entropies."""
    kinds = {getattr(getattr(objective, axis, None), "kind", None) for axis in ("token_weight", "trust_region")}
    return objective.needs().credit.teacher_entropy or bool(kinds & {"teacher_entropy", "entropy_gate"})


NOT_JUDGED = (
    "judge: nothing in this config reads rewards, so none are asked for and its stage does not run (null leaves it out)"
)
"""What a plan says about a config with a judge that nothing reads."""


NO_TEACHER_PASS = "supervise.teacher: none, so there is no teacher pass; the objective reads nothing of the teacher"
"""What a plan says about a config whose teacher is not run."""


def teacherless_problems(e: Experiment) -> list[str]:
    """What reads the teacher, where supervise does not run it."""
    if e.supervise.teacher.asked:
        return []
    problems, objective = [], e.objective
    if objective.estimator != "credit" or objective.reads_teacher:
        problems.append(
            f"supervise.teacher: none, but objective.estimator {objective.estimator} reads the teacher's log-probabilities"
            f"{' (scale, add, beside, likelihood or reference does)' * (objective.estimator == 'credit')}; set supervise.teacher:"
            " {kind: local}"
        )
    read_elsewhere = e.evaluate.generations("kl") > 0 or bool(e.rollout.behaviour.reads & {"teacher", "drafts"})
    for name, model in e.taught_by.items():
        if not read_elsewhere and getattr(model, "context", None) is not None:
            problems.append(
                f"{teacher_field(name)}.context: no teacher reads it: supervise.teacher is none, and the evaluation asks none"
                " (evaluate.kl_prompts: 0); leave it out"
            )
    return problems


def student_problems(e: Experiment) -> list[str]:
    """What reads values of the rollout-time student, where supervise does not run it."""
    if e.supervise.student == "full":
        return []
    readers = {
        f"objective.estimator: {e.objective.estimator} compares the sampled tokens with": e.objective.estimator
        not in ("direct", "pairs"),
        f"train.importance_correction: {e.train.importance_correction.kind} weights tokens by": (
            e.train.importance_correction.kind != "none"
        ),
        "train.max_drift: drift is measured from": e.train.max_drift is not None,
    }
    return [
        f"{what} the rollout-time student's log-probabilities, but supervise.student is none; set supervise.student: full"
        for what, reads in readers.items()
        if reads
    ]


def _stop_problems(e: Experiment) -> list[str]:
    """What cannot be with merged stop ids."""
    if e.prompts.tokenizers.stop_ids != "merge":
        return []
    problems = [
        f"{section}.stop_token_ids: with prompts.tokenizers.stop_ids: merge completions end with the ids of both models; leave it"
        " at eos"
        for section, ids in (("rollout", e.rollout.stop_token_ids), ("evaluate", e.evaluate.stop_token_ids))
        if ids != "eos"
    ]
    if not e.supervise.teacher.capabilities.merges_stop_ids:
        problems.append(
            f"supervise.teacher: kind {e.supervise.teacher.kind} cannot count several stop ids as one, which"
            " prompts.tokenizers.stop_ids: merge asks for; choose kind: local, or stop_ids: mask"
        )
    if e.teachers:
        problems.append(
            "prompts.tokenizers.stop_ids: merge makes one category of the stop ids of the student and one teacher, but there are"
            f" several (teachers: {', '.join(e.teachers)}); set stop_ids: mask, or give one `teacher`"
        )
    return problems


def sampling_problems(e: Experiment, truncated: Sequence[str]) -> list[str]:
    """What does not fit together of how rollouts are drawn (`truncated`: fields that cut the student's distribution off) and an
    estimator that takes the samples for the student's own."""
    problems, behaviour, objective = [], e.rollout.behaviour, e.objective
    correction = e.train.importance_correction.kind
    weighted = correction == "biased_truncated" and behaviour.weighable
    if not objective.requires_untruncated_sampling:
        if correction == "biased_truncated":
            problems.append(
                "train.importance_correction: biased_truncated weights samples for a sampled estimator, and this objective is"
                " none: an expectation needs no weights; take kind: none or truncated"
            )
        return problems
    if weighted:
        if not getattr(objective, "center", True):
            problems.append(
                "objective.center: false, but train.importance_correction: biased_truncated cannot see outside the nucleus, so"
                " that the part of a constant advantage does not vanish; set center: true"
            )
        if objective.exact_samples:
            problems.append(
                "objective.advantage: opd_plus is unbiased for exact samples of the student alone, which the weights of"
                " train.importance_correction: biased_truncated are not; take advantage: stop_gradient, or rollout.top_p: 1"
            )
        return problems
    if not behaviour.exact:
        weigh = ", or weight the tokens with train.importance_correction: {kind: biased_truncated}"
        problems.append(
            f"rollout.behaviour: with {behaviour.kind!r} the student does not draw every token, but this objective's"
            " sampled estimator needs exact samples of the student; use behaviour: student, or a direct objective"
            + (weigh if behaviour.weighable else "")
        )
    if truncated:
        problems.append(
            f"objective: a sampled estimator needs exact samples of the student, but {' and '.join(truncated)}; set"
            " rollout.top_p: 1, top_k: 0, temperature: 1 (no importance weight restores tokens that were cut off;"
            " train.importance_correction: {kind: biased_truncated} accepts that)"
        )
    return problems


def served_problems(e: Experiment) -> list[str]:
    """What cannot be done with a model whose weights are not on this machine."""
    problems: list[str] = []
    if isinstance(e.student.source, ServedModel):
        problems.append(
            "student.source: kind served is for a teacher; the student is trained, so its weights must be here"
        )
    server = isinstance(e.supervise.teacher, ServerTeacher)
    if server and e.teachers:
        problems.append(
            "supervise.teacher: kind server asks one model of one server, but there are several"
            f" (teachers: {', '.join(e.teachers)}); use kind: local or vllm with checkpoints, or give one `teacher`"
        )
    for name, model in e.taught_by.items():
        if not isinstance(model.source, ServedModel):
            continue
        field = teacher_field(name)
        if not server:
            problems.append(
                f"{field}.source: kind served has no weights, which supervise.teacher: {e.supervise.teacher.kind} reads; "
                + (
                    "set supervise.teacher: {kind: server, model: NAME}, or give a checkpoint"
                    if name is None
                    else "give a checkpoint"
                )
            )
        if model.warmup is not None:
            problems.append(f"{field}.warmup: kind served has no weights to train; leave the warm-up out")
        if e.rollout.behaviour.reads & {"teacher", "drafts"}:
            problems.append(
                f"rollout.behaviour: with {e.rollout.behaviour.kind!r} the sampler loads the teacher, but {field}.source kind"
                " served has no weights; give a checkpoint, or take behaviour: student"
            )
        if e.evaluate.generations("kl"):
            problems.append(
                "evaluate.kl_prompts: the exact reverse KL reads the teacher's whole distribution from its weights, which"
                f" {field}.source kind served does not have; set evaluate.kl_prompts: 0 (then it is not measured), or give a"
                f" checkpoint as {field}.source"
            )
    return problems


def _set_problems(e: Experiment) -> list[str]:
    """What is wrong with named evaluation sets."""
    problems = []
    served = any(isinstance(model.source, ServedModel) for model in e.taught_by.values())
    for name, one in e.evaluate.sets.items():
        if one.kl_prompts != 0 and (e.routed or served):
            why = "its prompts name none of several teachers" if e.routed else "a served teacher has no weights"
            problems.append(f"evaluate.sets.{name}.kl_prompts: {why}; set it to 0 (then no KL is measured)")
    return problems


def teacher_problems(e: Experiment) -> list[str]:
    """What is wrong with the choice of one teacher, of several, or of a mixture."""
    problems = []
    if e.teacher is not None and e.teachers:
        problems.append(
            "teacher, teachers: both are given; use `teacher` for one (and teachers: null), or `teachers` by name (and teacher:"
            " null)"
        )
    if e.teacher is None and not e.teachers:
        problems.append("teacher: required, but missing (or several by name: `teachers`)")
    for name, model in e.teachers.items():
        path = model.source.path if isinstance(model.source, CheckpointModel) else None
        if path is not None and path.name in SELF_TEACHERS and not path.exists():
            problems.append(
                f"teachers.{name}.source: {path.name!r} is the student itself, which can only be the one `teacher`; give"
                " a checkpoint"
            )
        if not NAME.fullmatch(name) or name in DISCRIMINATORS:
            problems.append(
                f"teachers: {name!r} is no name; use letters, digits, '.', '-' and '_', at most 64, a letter or digit first, and"
                f" not {' or '.join(map(repr, DISCRIMINATORS))}"
            )
        if (other := name.rpartition("_")[0]) in e.teachers and name.rpartition("_")[2] in PARTS:
            problems.append(
                f"teachers: beside {other!r} no teacher can be called {name!r}, because METRIC/{name} is a part of METRIC/{other}"
                " (its error, samples or prompts); choose another name"
            )
    for name, model in e.teachers.items():
        if model.context is not None and e.mixture is not None:
            problems.append(
                f"teachers.{name}.context: a mixture averages teachers that read the same text; leave it out, or remove `mixture`"
                " and give each prompt a teacher_id"
            )
        problems += template_problems(e, f"teachers.{name}.context", templates_of(model.context))
    if e.mixture is not None:
        problems += e.mixture.problems(e.teachers)
        if not e.supervise.teacher.capabilities.full_distribution:
            problems.append(
                f"mixture: averages the teachers' whole distributions, which supervise.teacher: kind {e.supervise.teacher.kind}"
                " does not give; use kind: local, or remove `mixture` and give each prompt a teacher_id"
            )
    if e.teachers and e.rollout.behaviour.reads & {"teacher", "drafts"}:
        problems.append(
            f"rollout.behaviour: {e.rollout.behaviour.kind!r} lets one teacher take part in writing, but there are several"
            f" (teachers: {', '.join(e.teachers)}); take behaviour: student, or give one `teacher`"
        )
    return problems + ([] if e.teacher is None else self_teacher_problems(e, e.teacher))


def self_teacher_problems(e: Experiment, teacher: TeacherConfig) -> list[str]:
    """What of a teacher that is the student, or of what a teacher reads, does not fit the rest."""
    problems: list[str] = []
    own, context = is_self(teacher.source), teacher.context
    if own and not e.supervise.teacher.reads_checkpoint:
        problems.append(
            f"supervise.teacher: kind {e.supervise.teacher.kind} answers with weights of its own, but teacher.source"
            f" {teacher.source.kind} is this run's student; choose kind: local"
        )
    if own and not isinstance(teacher.source, InitialStudent) and "drafts" in e.rollout.behaviour.reads:
        problems.append(
            f"rollout.behaviour: {e.rollout.behaviour.kind!r} reads completions that the teacher writes once for all rounds, but"
            f" teacher.source {teacher.source.kind} is another model in every round; set teacher.source: {{kind: initial}}, or"
            " take a behaviour that reads no drafts"
        )
    problems += template_problems(e, "teacher.context", templates_of(context))
    return problems + context_problems(e, teacher)


def template_problems(e: Experiment, field: str, templates: Sequence[str]) -> list[str]:
    """What of the templates of a context does not fit the prompts."""
    return [
        f"{field}: with prompts.chat_template: false a completion continues the text itself, so the template must end with"
        f" {{prompt}}, and it is {template!r}"
        for template in templates
        if not e.prompts.chat_template and not template.endswith("{prompt}")
    ]


def context_problems(e: Experiment, teacher: TeacherConfig) -> list[str]:
    """What contexts of samples need that the rest does not give."""
    named, problems = named_in(teacher.of_samples), []
    if teacher.sibling != SiblingConfig() and "sibling" not in named:
        problems.append(
            "teacher.sibling: is set, but teacher.context does not name {sibling}; name it, or leave this out"
        )
    if named & JUDGED and e.judge is None:
        names = " and ".join(f"{{{name}}}" for name in sorted(named & JUDGED))
        problems.append(
            f"teacher.context: {names} need the judge's rewards or feedback of the rollouts; set `judge` (its verifiers), or"
            " leave the column out"
        )
    elif e.judge is not None:
        problems += _judge_problems(e.judge, named)
    if "sibling" in named and e.rollout.num_generations == 1:
        problems.append(
            "teacher.context: {sibling} is another completion of the same prompt, but rollout.num_generations is 1; raise it, or"
            " leave the column out"
        )
    return problems


def _judge_problems(judge: JudgeConfig, named: set[str]) -> list[str]:
    """What contexts ask the judge for that its verifiers cannot give."""
    problems = []
    if "feedback" in named and not any(isinstance(verifier, JudgeFunction) for verifier in judge.verifiers):
        problems.append(
            f"teacher.context: {{feedback}} is a text of the judge's, but {' and '.join(judge.names)} give"
            f"{'s' * (len(judge.names) == 1)} none; add a function of yours that returns {{reward, feedback}} to judge.verifiers"
            " (docs/rewards.md), or leave the column out"
        )
    weights = [verifier.weight for verifier in judge.verifiers if verifier.weight]
    if named & {"sibling", "verdict"} and judge.success_threshold is None and weights != [1.0]:
        problems.append(
            f"judge.success_threshold: missing, but with the weights {', '.join(f'{w:g}' for w in weights)} rewards are not 0 or"
            " 1, and teacher.context asks which completions are correct; set it"
        )
    return problems


def prefix_problems(e: Experiment) -> list[str]:
    """Whether tokens that the student did not write are trained on by an objective that cannot use them, or not at all."""
    behaviour = e.rollout.behaviour
    if not behaviour.prefixes or e.objective.needs().takes_prefixes:
        return []
    left_out = "teacher_prefix" in e.train.mask_reasons
    if left_out and not behaviour.draws:
        return [
            "train.mask_reasons: teacher_prefix leaves out every token of these rollouts, none of which the student writes; take"
            " it out of the list"
        ]
    sampled = e.objective.estimator == "credit" and e.objective.requires_untruncated_sampling
    if not left_out and (sampled or e.objective.estimator == "policy_gradient"):
        return [
            "objective.estimator: a policy gradient needs the probability with which the student drew each token, but with"
            f" rollout.behaviour {behaviour.kind!r} others wrote some; put teacher_prefix into train.mask_reasons, take a trust"
            " region with a term for prefixes (tropd), or use estimator: direct"
        ]
    return []


def size_problems(e: Experiment, rows: int | None, positions: int | None, *teacher_rows: int | None) -> list[str]:
    """What does not fit models of these sizes: the student's rows and positions, each teacher's rows; None: unknown."""
    problems: list[str] = []
    inside = "beside.support" if e.objective.estimator == "credit" else "support"
    for section, length in (
        ("rollout", e.rollout.max_completion_length),
        ("evaluate", e.evaluate.max_completion_length),
    ):
        if positions and length >= positions:
            problems.append(
                f"{section}.max_completion_length: {length} leaves no room for a prompt in the student's"
                f" max_position_embeddings, {positions}"
            )
    for need in e.objective.needs().signals:
        if rows and need.k and need.k > rows:
            side = getattr(e.objective, "side", None)
            where = "trust_region" if side is not None and side.support.k == need.k else inside
            problems.append(f"objective.{where}.k: {need.k} is above the vocabulary of {rows}")
    support = getattr(e.objective, "support", None)
    if isinstance(support, FullSupport) and rows and all(teacher_rows):
        known = [other for other in teacher_rows if other]
        shared = {min(rows, other) for other in known} if e.routed else {min([rows, *known])}
        if len(shared) > 1:
            problems.append(
                f"objective.{inside}: full support means every id, but the teachers share"
                f" {' and '.join(map(str, sorted(shared)))} of them with the student; take kind: teacher_topk with outside:"
                " bucket"
            )
        elif support.k < (least := min(shared)):
            problems.append(
                f"objective.{inside}.k: full support means every id, but k is {support.k} and the vocabulary has {least}"
                f" rows; set k: {least}, or take kind: teacher_topk with outside: bucket"
            )
    return problems


MADE_AT_FIRST = ("student", "teacher", "teachers", "mixture", "prompts")
"""Sections of the config whose models and prompts round 0 makes."""


def refuse_changed_fork(e: Experiment) -> None:
    """ConfigError for a new fork that changes what round 0 of its parent made. Forks in the store that earlier versions accepted
    and ran without the change are still read."""
    if e.fork is None or e.parent is None:
        return
    for field in MADE_AT_FIRST:
        if getattr(e, field) != getattr(e.parent, field):
            raise ConfigError(
                f"{field}: a fork keeps the {field} of {e.fork.run!r}, which round 0 made; start a run of its own for other"
                " fields there (finished stages that it shares are found in the store)"
            )
    if unread := sorted(e.contexts.keys() - e.parent.at(0).contexts.keys()):
        raise ConfigError(
            f"evaluate.kl_prompts: {e.fork.run!r} measured no KL, so its prompts of {', '.join(unread)} were prepared without"
            " teacher.context, and the teacher would read them without it; set evaluate.kl_prompts: 0, or start a run of its own"
        )


def cut_problems(e: Experiment) -> list[str]:
    """What is wrong with the teacher's lists being cut off, for the divergence that reads them. In a renormalised list of one
    entry, which a cut makes of a sure token, nothing is compared; `drop` would leave out what the cut takes away."""
    if e.supervise.tail_mass is None:
        return []
    objective: Any = e.objective
    for compared in (objective, getattr(objective, "side", None)):
        support: Any = getattr(compared, "support", None)
        outside = getattr(support, "outside", "bucket")
        if outside != "bucket" and support.kind != "student_topk":
            return [
                f"supervise.tail_mass: {e.supervise.tail_mass:g} cuts the teacher's lists off, and what is cut counts only in the"
                f" bucket, but the objective's {support.kind} support has outside: {outside}; set outside: bucket, or leave"
                " supervise.tail_mass out"
            ]
    return []


WITH_DTYPE = ("rollout", "supervise", "train")


def dtype_warning(e: Experiment) -> str | None:
    """What differs between the dtypes of the student as it is sampled, scored and trained, and why it matters; None if nothing.

    Raises ConfigError for a policy gradient, unless `policy.allow_mixed_dtypes`: the ratio of the live to the rollout-time
    student would have noise before any update."""
    dtypes = {section: getattr(e, section).dtype for section in WITH_DTYPE}
    if len(set(dtypes.values())) == 1:
        return None
    shown = ", ".join(f"{section}.dtype {dtype}" for section, dtype in dtypes.items())
    text = (
        f"{shown}: the student that is sampled, scored and trained is not one and the same; its log-probabilities differ by"
        " rounding before any update"
    )
    if e.objective.estimator in ("policy_gradient", "credit") and not e.policy.allow_mixed_dtypes:
        raise ConfigError(
            f"{text}, which a policy gradient takes for an importance ratio. Set one dtype for all three, or accept it with"
            " policy.allow_mixed_dtypes: true"
        )
    return text
