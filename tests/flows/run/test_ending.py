"""Rules of `policy.stop` end a run, also when it is called again, and nothing is lost by changing them."""

from __future__ import annotations

from pathlib import Path

import scripted_run
import several_teachers as several

from flows.cli.options import console
from flows.cli.report import report
from flows.config_file import merge
from flows.experiment import Experiment, experiment_of
from flows.run.runner import resume_experiment
from storage.runs import RunState


def test_a_rule_ends_the_run_and_another_policy_goes_on(tmp_path: Path) -> None:
    root = scripted_run.prepare_root(tmp_path / "store")
    data = {k: v for k, v in scripted_run.EXPERIMENT.items() if k != "plugins"}
    e = experiment_of(merge(data, {"policy": {"rounds": 3, "stop": {"tokens": 1}}}), "test")

    def after(experiment: Experiment, jobs: bool) -> RunState:
        engines = several.go(root, experiment)
        assert bool(engines.of("TrainJob")) == jobs
        return several.state(root)

    first = after(e, jobs=True)
    assert (first.status, first.rounds_done) == ("finished", 1) and "policy.stop.tokens" in str(first.ended)
    shown = " ".join(str(part) for part in report(first, root, None, console()))
    assert "ended by a rule after round 1: policy.stop.tokens" in shown
    again = after(e, jobs=False)
    assert (again.status, again.rounds_done, again.ended) == ("finished", 1, first.ended)
    free = resume_experiment(several.NAME, root, ["policy.stop=null"])
    last = after(free, jobs=True)
    assert (last.status, last.rounds_done, last.ended) == ("finished", 3, None)
    # a rule that round 2 met counts at round 2 although round 3 is there
    tokens = int(sum(last.rounds[number].metrics["rollout_tokens"] or 0 for number in (1, 2)))
    late = after(resume_experiment(several.NAME, root, [f"policy.stop.tokens={tokens}"]), jobs=False)
    assert late.status == "finished" and "policy.stop.tokens" in str(late.ended) and len(late.rounds) == 4
