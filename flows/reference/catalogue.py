"""The catalogue behind `opd objectives` and docs/objectives.md: recipes, and the choices on each axis of an objective.

Everything comes from its definition: equation, paper, fields and defaults from classes, header comment and fields from
recipe files."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flows.config_file import CHECKOUT, CONFIGS
from flows.experiment import Experiment, load_experiment
from tasks.behaviours import BEHAVIOURS
from tasks.engines.teacher import TEACHERS
from tasks.inputs.teachers import SELF_TEACHERS
from tasks.losses.axes import FullSupport, SampledToken, StudentCandidates, TopkSupport
from tasks.losses.config import CreditConfig, DirectConfig, PairsConfig, PolicyGradientConfig, SftConfig
from tasks.losses.credit import CREDITS
from tasks.losses.divergences import DIVERGENCES, Divergence
from tasks.losses.registry import Registry
from tasks.losses.token_credit.additions import ADDITIONS
from tasks.losses.token_credit.beside import Beside, Clip, Likelihood, Reference, SequenceGradient
from tasks.losses.token_credit.returns import RETURNS
from tasks.losses.token_credit.rewards import REWARDS
from tasks.losses.token_credit.routes import ROUTES
from tasks.losses.token_credit.scales import SCALES
from tasks.losses.token_credit.targets import TARGETS
from tasks.losses.token_credit.weights import DIVERGENCE_WEIGHTS
from tasks.losses.token_weights import TOKEN_WEIGHTS
from tasks.losses.trust_regions import TRUST_REGIONS
from tasks.mixture import MixtureConfig

RECIPES = CONFIGS / "recipes"
_PAPER = re.compile(r"\b(\d{4}\.\d{5})\b")

OUTSIDE = {
    "renormalize": "p and q divided by their own mass on S: p^ = p / p(S), q^ = q / q(S)",
    "bucket": "one more category: p(rest) = 1 - p(S), q(rest) = 1 - q(S)",
    "drop": "only the terms of S, unnormalised; no divergence, can be negative",
}
SUPPORTS = {
    "direct": {
        "teacher_topk": "S = the k ids with the largest q",
        "student_topk": "S = the k ids with the largest p_old",
        "union": "S = both lists together",
        "full": "S = every id, k = V",
    },
    "policy_gradient": {
        "sampled": "the sampled token y alone",
        "student_topk": "sum_{v in S} -sg(w(v) A(v)) rho(v), S = the k ids with the largest p_old, w = p_old or p over S",
    },
}
"""The estimators; a name that several share has its own fields in each."""


@dataclass(frozen=True)
class Field:
    """One field of a config, as a user sees it."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    """A recipe, or a choice on an axis."""

    name: str
    axis: str
    summary: str
    equations: tuple[str, ...]
    papers: tuple[str, ...]
    experimental: bool
    code: str
    """path of the file from the checkout, and the name in it"""
    fields: tuple[Field, ...]
    about: str
    """full description from its definition"""
    uses: tuple[str, ...] = ()
    """axes and labels of a recipe's entries"""
    file: str = ""
    """a recipe's file, from the checkout"""
    estimator: str = ""
    """the only estimator that has this choice, if the axis has different choices per estimator"""

    @property
    def label(self) -> str:
        """The name, qualified if other entries have the same name."""
        return f"{self.name} ({self.estimator})" if self.estimator else self.name

    @property
    def anchor(self) -> str:
        return "-".join(re.findall(r"[a-z0-9]+", f"{self.axis} {self.label}"))


def catalogue() -> list[Entry]:
    """All entries: recipes first, then the axes in the order of a config."""
    estimators = [_of_class(c.model_fields["estimator"].default, "estimator", c) for c in _ESTIMATORS]
    found = [_recipe(path) for path in sorted(RECIPES.glob("*.yaml"))] + estimators
    found += [_of_class(kind, "divergence", c) for kind, c in DIVERGENCES.classes.items()]
    found += [_support(estimator, kind) for estimator, kinds in SUPPORTS.items() for kind in kinds]
    found += [_outside(kind, equation) for kind, equation in OUTSIDE.items()]
    found += [_of_class(kind, "credit", c) for kind, c in CREDITS.classes.items()]
    found += [_of_class(kind, "trust region", c) for kind, c in TRUST_REGIONS.classes.items()]
    found += [_of_class(kind, "token weight", c) for kind, c in TOKEN_WEIGHTS.classes.items()]
    for axis, registry in _CREDIT_AXES.items():
        found += [_of_class(kind, axis, c) for kind, c in registry.classes.items()]
    found += [_of_class(name, "term", c) for name, c in _TERMS.items()]
    found += [_of_class(kind, "behaviour", c) for kind, c in BEHAVIOURS.classes.items()]
    found += [_of_class(kind, "teacher backend", c) for kind, c in TEACHERS.classes.items()]
    found += [_of_class(kind, "teacher", c) for kind, c in SELF_TEACHERS.items()]
    return [*found, _ROUTED, _of_class("mixture", "teacher", MixtureConfig), *_NOT_BUILT]


_CREDIT_AXES: dict[str, Registry[Any]] = {
    "reward": REWARDS,
    "scale": SCALES,
    "addition": ADDITIONS,
    "return": RETURNS,
    "route": ROUTES,
    "target": TARGETS,
    "divergence weight": DIVERGENCE_WEIGHTS,
}
"""Axes of `estimator: credit`."""
_TERMS: dict[str, Any] = {
    "beside": Beside,
    "sequence_gradient": SequenceGradient,
    "clip": Clip,
    "likelihood": Likelihood,
    "reference": Reference,
}


def _missing(name: str, why: str, code: str) -> Entry:
    return Entry(
        name, "not built", why, ("not known",), (), False, code, (), f"{why}. The nearest that is here: {code}."
    )


_NOT_BUILT = (
    _missing(
        "pgpo",
        "Not here: the function of teacher and student that weighs its policy gradient is not known from summaries",
        "tasks/losses/token_credit/scales.py Scale",
    ),
    _missing(
        "socratic-po",
        "Not here: it learns from a dialogue of several turns, and what its discount applies to is not known from summaries",
        "tasks/losses/token_credit/returns.py Discounted",
    ),
    _missing(
        "raps-da",
        "Not here: how it selects a teacher is not known from summaries; its routing by label is `teachers` with a teacher_id",
        "tasks/routing.py own_prompts",
    ),
)


_ROUTED = Entry(
    name="routed",
    axis="teacher",
    summary="Several `teachers` by name, each with prompts of its own: a prompt's `teacher_id` names its teacher",
    equations=("q(. | x) = q_i(. | x), i the teacher_id of the prompt x",),
    papers=(),
    experimental=False,
    code="tasks/routing.py own_prompts",
    fields=(),
    about="Several `teachers` by name, each with prompts of its own. One signal artifact per teacher, loaded one after the other;"
    " see docs/teachers.md.",
)


def axes(entries: list[Entry]) -> list[str]:
    """The axes of a catalogue, in order."""
    return list(dict.fromkeys(entry.axis for entry in entries))


_ESTIMATORS: dict[type[BaseModel], str] = {  # where each is computed; named, so that listing them loads no torch
    DirectConfig: "tasks/losses/direct.py DirectObjective",
    PolicyGradientConfig: "tasks/losses/policy_gradient.py PolicyGradientObjective",
    CreditConfig: "tasks/losses/token_credit/objective.py CreditObjective",
    PairsConfig: "tasks/losses/pairs.py PairsObjective",
    SftConfig: "tasks/losses/sft.py SftObjective",
}
_SUPPORT_OF = {"credit": "direct"}
"""By estimator the one whose supports it has."""
_SUPPORT_CLASSES: dict[tuple[str, str], type[BaseModel]] = {
    ("direct", "full"): FullSupport,
    ("policy_gradient", "sampled"): SampledToken,
    ("policy_gradient", "student_topk"): StudentCandidates,
}


def _of_class(name: str, axis: str, cls: Any) -> Entry:
    about = inspect.getdoc(cls) or ""
    equations = [cls.equation]
    if issubclass(cls, Divergence) and cls.f_equation:
        equations += [f"f(u) = {cls.f_equation}", f"w_f(u) = {cls.w_equation}"]
    return Entry(
        name=name,
        axis=axis,
        summary=first_sentence(about),
        equations=tuple(equations),
        papers=tuple(dict.fromkeys([cls.paper] if cls.paper else _PAPER.findall(about))),
        experimental=getattr(cls, "experimental", False),
        code=_ESTIMATORS.get(cls) or _where(cls),
        fields=_fields(cls),
        about=about,
    )


def _support(estimator: str, kind: str) -> Entry:
    cls, equation = _SUPPORT_CLASSES.get((estimator, kind), TopkSupport), SUPPORTS[estimator][kind]
    about = inspect.getdoc(cls) or ""
    summary = equation if estimator == "direct" else first_sentence(about)
    code, fields = _where(cls), _fields(cls)
    return Entry(kind, "support", summary, (equation,), (), False, code, fields, about, estimator=estimator)


def _outside(kind: str, equation: str) -> Entry:
    from tasks.losses import support

    code = "tasks/losses/support.py categories"
    return Entry(kind, "outside", equation, (equation,), (), False, code, (), inspect.getdoc(support) or "")


def _recipe(path: Path) -> Entry:
    header = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    about = " ".join(header)
    experiment = load_experiment(path)
    objective = experiment.objective
    made_of = parts_of(experiment)
    equations = [f"{axis} {name}: {equation}" for axis, name, equation in made_of]
    return Entry(
        name=path.stem,
        axis="recipe",
        summary=first_sentence(about),
        equations=tuple(equations),
        papers=tuple(dict.fromkeys(_PAPER.findall(about))),
        experimental="experimental" in about.lower(),
        code=_ESTIMATORS[type(objective)],
        fields=_values(objective),
        about=about,
        uses=tuple(
            f"{axis} {name} ({_SUPPORT_OF.get(objective.estimator, objective.estimator)})"
            if axis == "support"
            else f"{axis} {name}"
            for axis, name, _ in made_of
        ),
        file=str(path.relative_to(CONFIGS.parent)),
    )


def parts_of(experiment: Experiment) -> list[tuple[str, str, str]]:
    """(axis, name, equation) of a method's parts: of the objective, and who teaches and writes where that is not the default."""
    found = _parts(experiment.objective)
    if (backend := experiment.supervise.teacher).kind != "local":
        found.append(("teacher backend", backend.kind, backend.equation))
    if (behaviour := experiment.rollout.behaviour).kind != "student":
        found.append(("behaviour", behaviour.kind, behaviour.equation))
    if (own := experiment.self_teacher) is not None:
        found.append(("teacher", own.kind, own.equation))
    if experiment.teachers:
        kind = "routed" if experiment.routed else "mixture"
        found.append(("teacher", kind, _ROUTED.equations[0] if experiment.routed else MixtureConfig.equation))
    return found


def _parts(objective: Any) -> list[tuple[str, str, str]]:
    """(axis, name, equation) of an objective's parts, without parts that have no effect."""
    parts = [("estimator", objective.estimator, objective.equation)]
    if isinstance(objective, CreditConfig):
        return parts + _parts_of_credit(objective)
    if isinstance(objective, PairsConfig):
        return parts
    divergence = objective.divergence
    if objective.estimator == "direct":
        parts.append(("divergence", divergence.kind, f"D = {divergence.equation}"))
    else:
        parts.append(("divergence", divergence.kind, f"f(u) = {divergence.f_equation}"))
    kind = objective.support.kind
    parts.append(("support", kind, SUPPORTS[objective.estimator][kind]))
    outside = getattr(objective.support, "outside", None)
    if outside is not None and objective.support.kind != "full":
        parts.append(("outside", outside, OUTSIDE[outside]))
    if objective.estimator == "policy_gradient":
        credit = objective.advantage
        centred = ", centred at u = 1" if objective.center and credit.delta_at_one(divergence) else ""
        parts.append(("credit", credit.kind, f"{credit.of(divergence)}{centred}"))
    for axis, choice in (
        ("trust region", getattr(objective, "trust_region", None)),
        ("token weight", objective.token_weight),
    ):
        if choice is not None and choice.kind != "none":
            parts.append((axis, choice.kind, choice.configured))
    return parts


def _parts_of_credit(objective: CreditConfig) -> list[tuple[str, str, str]]:
    """The same of rewards and token credit."""
    beside = objective.beside
    chosen: list[tuple[str, Any, str]] = [
        ("reward", objective.reward, "none"),
        ("scale", objective.scale, "none"),
        ("addition", objective.add, "none"),
        ("return", objective.returns, "token"),
        ("route", objective.route, "all"),
    ]
    if beside is not None:
        chosen += [("target", beside.target, "teacher"), ("divergence weight", beside.weight, "none")]
    parts = [(axis, choice.kind, choice.configured) for axis, choice, plain in chosen if choice.kind != plain]
    terms = {name: getattr(objective, name) for name in ("beside", "clip", "likelihood", "reference")}
    terms["sequence_gradient"] = None if beside is None else beside.sequence_gradient
    parts += [("term", name, term.equation) for name, term in terms.items() if term is not None]
    if beside is not None:
        parts.append(("divergence", beside.divergence.kind, f"D = {beside.divergence.equation}"))
        parts.append(("support", beside.support.kind, SUPPORTS["direct"][beside.support.kind]))
        if beside.support.kind != "full":
            parts.append(("outside", beside.support.outside, OUTSIDE[beside.support.outside]))
    return parts


def _fields(cls: type[BaseModel]) -> tuple[Field, ...]:
    found = []
    for name, info in _ordered(cls):
        default = "required" if info.default is PydanticUndefined else _shown(info.default)
        found.append(Field(name, default, info.description or ""))
    return tuple(found)


def _values(objective: BaseModel) -> tuple[Field, ...]:
    cls = type(objective)
    return tuple(Field(name, _shown(getattr(objective, name)), info.description or "") for name, info in _ordered(cls))


def _ordered(cls: type[BaseModel]) -> list[tuple[str, Any]]:
    """A class's own fields, then those it shares with others; without fields that only name the class."""
    fields = [item for item in cls.model_fields.items() if item[0] not in ("kind", "estimator")]
    return sorted(fields, key=lambda item: item[0] not in cls.__annotations__)


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        inside = ", ".join(f"{k}: {_shown(v)}" for k, v in value)
        return f"{{{inside}}}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _where(cls: Any) -> str:
    file = Path(inspect.getfile(cls)).resolve()
    path = file.relative_to(CHECKOUT) if file.is_relative_to(CHECKOUT) else file.name
    return f"{path} {cls.__name__}"


def first_sentence(text: str) -> str:
    return re.split(r"\.(?:\s|$)", " ".join(text.split()), maxsplit=1)[0]
