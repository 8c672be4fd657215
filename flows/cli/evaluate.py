"""`opd evaluate`: rounds that were left out, other prompts, tasks of lm-eval, and a run's verifiers under stress."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.cli.options import AtRound, Quiet, Root, RunJson, Verbose, at_round, console, example, local
from flows.cli.run import Output, go
from flows.run.hints import DEFAULT_ROOT, opd_command
from storage.errors import ConfigError, InputError
from storage.runs import Run

if TYPE_CHECKING:
    from flows.distill import Further
    from flows.experiment import Experiment

out = console()
err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command(epilog=example("opd evaluate demo --round 3 --prompts gsm8k.jsonl --verifier math_verify"))(evaluate)


def evaluate(
    name: AtRound,
    round: Annotated[
        list[int],
        typer.Option(
            "--round", min=0, help="a round; can be repeated (default: all not evaluated yet; of a set the last)"
        ),
    ] = [],  # noqa: B006
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="another evaluation set: prompts, with answers, or {path: ...}"),
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option("--verifier", metavar="KIND[:ARG]", help="of the set (default: the run's): exact_match:REGEX"),
    ] = None,
    set_name: Annotated[str | None, typer.Option("--set-name", help="the set's name (default: the file's)")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="prompts of the set or of a task, or completions of --stress")
    ] = None,
    stress: Annotated[
        bool,
        typer.Option("--stress", help="test the verifiers: how often form alone changes their verdict (one round)"),
    ] = False,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="NAMES", help="tasks of lm-eval, with commas: gsm8k,arc_easy")
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", metavar="DIR", help="tasks of yours (YAML), as lm-eval has it", callback=local),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="examples of a task (default: its own number)")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="render a task's requests as the student's chat")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json_: RunJson = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Evaluate rounds that `policy.evaluate_every` left out, or any round on other prompts (--prompts) or tasks of lm-eval
    (--tasks).

    A student that `opd gc` evicted is rebuilt first. Metrics of a set or a task stand apart under its name. --tasks needs
    `pip install 'opdflow[lm-eval]'`, and the data sets of the tasks.

    With --stress the verifiers are asked again about completions of one round (default: the last) and about the same completions
    with steps renumbered, independent lines exchanged, neutral lines or marks of confidence added; nothing is sampled or stored.
    --verifier names another verifier to test.

    Exit codes: as for `opd run`; 2 also for a round that is not trained yet, for a set that cannot be measured, and for --stress
    without a verifier or completions."""
    name, at = at_round(name)
    round = sorted({*round, at}) if at is not None else round
    held = Run.open(root, name)
    known = [r.round for r in held.state.rounds if r.student_sha256]
    if missing := sorted(set(round) - set(known)):
        raise InputError(f"run {name!r}: round {missing[0]} is not trained yet; trained are {known or 'none'}")
    last = max(known, default=0)
    call = _Call(held, tuple(sorted(set(round) or {last})), last, root, Output(json_, verbose, quiet))
    own = {"include-path": include_path, "num-fewshot": num_fewshot, "apply-chat-template": chat_template or None}
    _only_with("--tasks", tasks, own)
    if stress:
        _only_without_stress({"prompts": prompts, "set-name": set_name, "tasks": tasks}, round)
        return _stress(call, verifier, limit)
    if prompts is not None and tasks is not None:
        raise ConfigError("--prompts and --tasks: call the command once for each")
    _only_with("--prompts", prompts, {"verifier": verifier, "set-name": set_name})
    if prompts is None and tasks is None:
        _only_with("--prompts or --tasks", None, {"limit": limit})
        return _left_out(call, round)
    if not known:
        raise InputError(f"run {name!r}: no round has a student yet; {opd_command(root, 'resume', name)}")
    if tasks is not None:
        return _tasks(call, tasks, limit, num_fewshot, chat_template, include_path)
    if prompts is not None:
        label = re.sub(r"\W", "_", Path(prompts).stem).lower() if set_name is None else set_name
        _set(call, label, prompts, verifier, limit)


@dataclass(frozen=True)
class _Call:
    """What every form of the command needs. `rounds`: those that were named, else the last."""

    held: Run
    rounds: tuple[int, ...]
    last: int
    root: Path
    output: Output

    @functools.cached_property
    def experiment(self) -> Experiment:
        from flows.run.runner import stored_experiment

        return stored_experiment(self.held)

    def go(self, wanted: Callable[[int], bool], further: Further | None = None) -> None:
        go(self.experiment, self.held.name, self.root, self.last, True, self.output, wanted, further)


def _no_round(number: int) -> bool:
    return False


def _left_out(call: _Call, round: list[int]) -> None:
    """The rounds that were named, or that policy.evaluate_every left out."""
    wanted = set(round) or {r.round for r in call.held.state.rounds if r.unevaluated}
    if not wanted and not call.output.json:
        out.print(f"nothing to do: run {call.held.name!r} left out no evaluation (policy.evaluate_every)")
        return
    call.go(wanted.__contains__)


def _set(call: _Call, label: str, prompts: str, verifier: str | None, limit: int | None) -> None:
    """Another evaluation set."""
    from flows.run.further_set import further_set

    call.go(_no_round, further_set(call.held, call.experiment, label, prompts, verifier, limit, list(call.rounds)))


def _tasks(
    call: _Call,
    tasks: str,
    limit: int | None,
    num_fewshot: int | None,
    chat_template: bool,
    include_path: Path | None,
) -> None:
    """Tasks of lm-eval, named with commas."""
    from flows.distill import FurtherTasks
    from tasks.inputs.harness import HarnessConfig, find_tasks, require_lm_eval

    names = list(dict.fromkeys(part.strip() for part in tasks.split(",") if part.strip()))
    if not names:
        raise ConfigError("--tasks: names no task; for example --tasks gsm8k,arc_easy")
    require_lm_eval()
    if not (call.output.quiet or call.output.json):
        err.print(f"loading lm-eval and the data of {', '.join(names)}", style="dim")
    asked = HarnessConfig(
        task=names[0], limit=limit, num_fewshot=num_fewshot, chat_template=chat_template,
        dtype=call.experiment.evaluate.dtype,
    )  # fmt: skip
    call.go(_no_round, FurtherTasks(tuple(find_tasks(names, asked, include_path)), call.rounds))


def _stress(call: _Call, verifier: str | None, limit: int | None) -> None:
    """The verifiers on changed completions of a round; nothing is run or stored."""
    from flows.cli.stressed import print_stress
    from flows.run.stress import stress
    from storage.store import Store

    print_stress(stress(call.held, call.rounds[0], Store(call.root), verifier, limit), call.output.json, out)


def _only_with(option: str, given: str | None, fields: Mapping[str, object]) -> None:
    for field, value in fields.items():
        if given is None and value is not None:
            raise ConfigError(f"--{field}: goes with {option}")


def _only_without_stress(fields: Mapping[str, object], round: list[int]) -> None:
    if (given := [field for field, value in fields.items() if value]) or len(round) > 1:
        what = f"--{given[0]}" if given else "several rounds"
        raise ConfigError(f"--stress and {what}: --stress reads the completions of one round; leave one of them out")
