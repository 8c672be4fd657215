"""A class that lacks what its axis needs is refused when it is registered, by its name."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import pytest

from opdflow import plugin
from storage.schemas import TABLES


class BareSignal(plugin.Signal):
    name = "bare_signal"
    schema = TABLES["mask"]


class BareBehaviour(plugin.Behaviour):
    kind: Literal["bare"] = "bare"


class BareCredit(plugin.Credit):
    kind: Literal["bare"] = "bare"
    equation = paper = ""


class BareDivergence(plugin.Divergence):
    kind: Literal["bare"] = "bare"
    equation = paper = ""

    def f(self, log_u):
        return log_u


class BareWeight(plugin.TokenWeight):
    kind: Literal["bare"] = "bare"
    equation = paper = ""


class BareTeacher(plugin.TeacherBackend):
    kind: Literal["bare"] = "bare"
    capabilities = plugin.Capabilities()


class UndeclaredTeacher(BareTeacher):
    kind: Literal["undeclared"] = "undeclared"
    capabilities: ClassVar[plugin.Capabilities] = None  # type: ignore[assignment]

    def rows(self, folder):
        return 1

    def open(self, folder, dtype, host):
        raise NotImplementedError


class Nameless(plugin.Signal):
    def wanted(self, k, sampling):
        return plugin.Wanted()

    def table(self, shard):
        return shard.rollouts


@pytest.mark.parametrize(
    ("cls", "lacks"),
    [
        (BareSignal, "it lacks the methods table, wanted"),
        (Nameless, "it lacks name and schema"),
        (BareBehaviour, "it lacks the method write"),
        (BareCredit, "it lacks the method __call__"),
        (BareDivergence, "it lacks the methods terms, w"),
        (BareWeight, "it lacks the method __call__"),
        (BareTeacher, "it lacks the methods open, rows"),
        (UndeclaredTeacher, "capabilities"),
    ],
)
def test_it_is_refused_by_its_name(cls: type, lacks: str) -> None:
    with pytest.raises(TypeError, match=rf"^{cls.__name__}: .*{re.escape(lacks)}"):
        plugin.register(cls)
