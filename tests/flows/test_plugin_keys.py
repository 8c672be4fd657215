"""A plugin's source enters the keys of exactly the stages that use what it registered (tasks/plugins.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from key_walk import PLUGGED, keys_of
from places import DATA

from flows.config_file import merge
from flows.experiment import Experiment, experiment_of
from flows.run.runner import fork_experiment, open_run, plan, resume_experiment, run_experiment
from storage.errors import ConfigError, IdentityMismatch
from storage.store import Store
from tasks import plugins
from tasks.losses.credit import CREDITS
from tasks.losses.divergences import DIVERGENCES
from tasks.losses.token_weights import TOKEN_WEIGHTS
from tasks.losses.trust_regions import TRUST_REGIONS
from tasks.workers import jobs

GOLDEN = yaml.safe_load((DATA / "golden.yaml").read_text())
POLICY_GRADIENT = {"rollout": {"top_p": 1.0}, "objective": {"estimator": "policy_gradient"}}
KIND = """
    from typing import Literal
    from tasks.losses.{module} import {base}, register

    @register
    class Mine({base}):
        kind: Literal["mine"] = "mine"
    """
CREDIT = """
    from typing import Literal
    from tasks.losses.credit import Credit, CreditContext, CreditTerms, register

    @register
    class Mine(Credit):
        kind: Literal["mine"] = "mine"

        def __call__(self, context: CreditContext) -> CreditTerms:
            return CreditTerms(delta=context.log_u)
    """
ROLE = """
    from tasks.workers.jobs import register_role

    register_role("{role}", f"{{__name__}}:Engine")
    """
BRINGS = {role: ROLE.format(role=role) for role in ("sampler", "scorer", "trainer")} | {
    "divergence": KIND.format(module="divergences", base="ReverseKL"),
    "credit": CREDIT,
    "trust_region": KIND.format(module="trust_regions", base="NoTrustRegion"),
    "token_weight": KIND.format(module="token_weights", base="Unweighted"),
    "verifier": "def right(text, answer): return True",
    "nothing": "",
}
USES = {
    "divergence": {"objective": {"divergence": {"kind": "mine"}}},
    "credit": merge(POLICY_GRADIENT, {"objective": {"advantage": "mine"}}),
    "trust_region": merge(POLICY_GRADIENT, {"objective": {"trust_region": {"kind": "mine"}}}),
    "token_weight": {"objective": {"token_weight": {"kind": "mine"}}},
    "verifier": {"evaluate": {"verifier": {"kind": "function", "target": "MODULE:right"}}},
}
"""What a config says to use it; an engine is used wherever its role is."""


@pytest.fixture(autouse=True)
def _registries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test's plugins register is forgotten after it, and they are imported as by a new process."""
    for registry in (DIVERGENCES, CREDITS, TRUST_REGIONS, TOKEN_WEIGHTS):
        monkeypatch.setattr(registry, "classes", dict(registry.classes))
    monkeypatch.setattr(jobs, "ROLES", dict(jobs.ROLES))
    monkeypatch.setattr(plugins, "_registered", list(plugins._registered))
    monkeypatch.setattr(plugins, "_loaded", dict(plugins._loaded))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write(folder: Path, name: str, source: str) -> str:
    (folder / f"{name}.py").write_text(dedent(source))
    return name


def using(name: str, what: str) -> Experiment:
    """The golden experiment with a plugin, which it uses."""
    over = yaml.safe_load(yaml.safe_dump(USES.get(what, {})).replace("MODULE", name))
    return experiment_of(merge(GOLDEN, over) | {"plugins": [name]}, "test")


def stages(keys: dict[str, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for place, key in keys.items():
        _, label, output = place.split("/")
        found.setdefault(output if label == "supervise" else label.removesuffix("_teacher"), set()).add(key)
    return found


@pytest.mark.promise(12, "a plugin's source changed: the keys that change")
@pytest.mark.parametrize("what", sorted(PLUGGED))
def test_a_plugins_source_changes_the_keys_of_what_uses_it(tmp_path: Path, what: str) -> None:
    store = Store(tmp_path / "store")
    experiment = using(write(tmp_path, f"brings_{what}", BRINGS[what]), what)
    (name,) = experiment.plugins
    sources = {name: "0" * 64, "bystander": "0" * 64}
    without, first, second, beside = (
        stages(keys_of(experiment.model_copy(update={"plugin_sources": given}), store))
        for given in ({}, sources, sources | {name: "1" * 64}, sources | {"bystander": "1" * 64})
    )
    due = PLUGGED[what] & first.keys()
    assert bool(due) == (what != "nothing")
    for other in (without, second):
        assert {stage for stage in first if first[stage] != other[stage]} == due
    assert beside == first


def test_a_class_from_beside_the_plugin_counts_for_it(tmp_path: Path) -> None:
    write(tmp_path, "helper_of_it", BRINGS["divergence"])
    name = write(tmp_path, "brings_it_from_elsewhere", "import helper_of_it")
    e = using(name, "divergence")
    store = Store(tmp_path / "store")
    first, second = (
        stages(keys_of(e.model_copy(update={"plugin_sources": {name: d * 64}}), store)) for d in ("0", "1")
    )
    assert {stage for stage in first if first[stage] != second[stage]} == {"train"}


def test_the_digest_is_of_the_modules_file_or_of_all_files_of_a_package(tmp_path: Path) -> None:
    write(tmp_path, "alone", "A = 1")
    package = tmp_path / "several"
    (package / "below").mkdir(parents=True)
    for path in ("__init__.py", "one.py", "below/two.py"):
        (package / path).write_text("")
    write(package, "below/notes", "")
    before = plugins.source_digest("alone"), plugins.source_digest("several")
    assert before == (plugins.source_digest("alone"), plugins.source_digest("several"))
    (package / "data.txt").write_text("no source")
    assert plugins.source_digest("several") == before[1]
    (package / "below" / "two.py").write_text("B = 1")
    assert plugins.source_digest("several") != (changed := before[1])
    (package / "below" / "two.py").rename(package / "below" / "three.py")
    assert plugins.source_digest("several") != changed
    write(tmp_path, "alone", "A = 2")
    assert plugins.source_digest("alone") != before[0]


@pytest.mark.parametrize("name", ["no_such_plugin", "no_such.plugin", "../up", ".relative", "", "sys"])
def test_what_is_no_module_with_a_source_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="plugins: no module named"):
        experiment_of(GOLDEN | {"plugins": [name]}, "test")


def test_a_run_keeps_its_plugins_and_a_plan_shows_what_a_new_one_changes(tmp_path: Path) -> None:
    name = write(tmp_path, "brings_scorer_once", BRINGS["scorer"])
    root = tmp_path / "store"
    config = GOLDEN | {"plugins": [name]}
    begun = open_run(with_digests(experiment_of(config, "test")), "base", root)
    assert begun.experiment["plugin_sources"] == {name: plugins.source_digest(name)}
    open_run(with_digests(experiment_of(config, "test")), "base", root)
    assert [line.state for line in plan(experiment_of(config, "test"), root)][:1] == ["run"]
    write(tmp_path, name, BRINGS["scorer"] + "\n    # edited")
    plugins._loaded.pop(name)
    for again in (lambda: resume_experiment("base", root, []), lambda: experiment_of(config, "test")):
        with pytest.raises(IdentityMismatch, match=rf"'{name}' \(.*{name}\.py\) has changed.*opd resume base"):
            run_experiment(again(), name="base", root=root, prefect=False)
    fork = fork_experiment("base", 0, root, [])
    assert fork.plugin_sources == {} and fork.at(0).plugin_sources == begun.experiment["plugin_sources"]


def with_digests(experiment: Experiment) -> Experiment:
    return experiment.model_copy(update={"plugin_sources": plugins.load_plugins(experiment.plugins)})


def test_a_plugin_that_fails_on_import_is_refused_with_its_file_and_line(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "fails_on_import.py"
    path.write_text("class Mine:\n    pass\n\n\nraise TypeError('it lacks a method')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as refused:
        plugins.load_plugins(["fails_on_import"])
    assert "'fails_on_import' fails on import" in str(refused.value)
    assert f"{path}:5: TypeError: it lacks a method" in str(refused.value)
