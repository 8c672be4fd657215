"""The read-only commands: output, exit codes, and modules that they never load."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main
from opd_cli import in_this_process
from places import CHECKOUT

from flows.cli.app import make_app
from flows.cli.errors import exit_codes
from flows.cli.report import next_commands
from storage.errors import ConfigError, InputError, RunBusy, StoreError
from storage.runs import RoundState, Run, RunState, StageState
from storage.store import Store
from tasks.workers.logs import CUT

HEAVY = ("torch", "vllm", "transformers", "prefect", "deepspeed", "datasets")
COMMANDS = typer.main.get_command(make_app()).commands


@pytest.fixture
def opd(monkeypatch, capsys, tmp_path, example_store_once):
    """Call `opd` in this process, on the example store unless a root is given, from an unrelated directory."""
    monkeypatch.chdir(tmp_path)
    return in_this_process(monkeypatch, capsys, example_store_once)


@pytest.mark.parametrize(
    "args", [["ls"], ["ls", "--json"], ["status", "demo"], ["logs", "demo"], ["query", "select 1"], ["compare", "demo"]]
)
def test_looking_loads_no_engine(args, example_store_once):
    script = (
        "import sys\nfrom flows.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *args, "--root", str(example_store_once)]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert result.stderr.strip().splitlines()[-1] == "[]"
    assert result.stdout


WITHOUT_A_STORE = ("init", "objectives", "recipes", "version")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_root_an_example_and_exit_codes(name):
    command = COMMANDS[name]
    roots = [p for p in command.params if "--root" in p.opts]
    assert len(roots) == (name not in WITHOUT_A_STORE)
    assert all(root.envvar == "OPD_ROOT" and str(root.default) == "opd-store" for root in roots)
    assert command.epilog.startswith(f"Example: opd {name}")
    assert "xit codes" in command.help


def test_the_root_comes_from_the_environment_too(opd, monkeypatch, example_store_once):
    monkeypatch.setenv("OPD_ROOT", str(example_store_once))
    assert opd("ls", "--json", root=None).out == opd("ls", "--json").out


def test_ls_gives_each_run_with_its_last_round(opd):
    listed = {entry["name"]: entry for entry in json.loads(opd("ls", "--json").out)}
    assert {name: entry["round"] for name, entry in listed.items()} == {"demo": 2, "other": 1}
    assert listed["demo"]["metrics"]["accuracy_greedy"] == 0.75
    text = opd("ls").out
    assert "demo" in text and "75.0%" in text and "0.7500" in text


def test_ls_of_nothing_is_no_error_and_makes_nothing(opd, tmp_path):
    root = tmp_path / "nowhere"
    assert opd("ls", "--json", root=root) == (0, "[]\n", "")
    assert "no runs" in opd("ls", root=root).out
    assert not root.exists()


@pytest.mark.parametrize(
    "args", [["status"], ["status", "x"], ["logs", "x"], ["query", "select 1"], ["export", "x", "y"]]
)
def test_what_is_not_there_is_exit_2_in_one_block_and_makes_nothing(args, opd, tmp_path):
    result = opd(*args, root=tmp_path / "nowhere")
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_run_is_answered_with_the_nearest(opd):
    assert "did you mean 'demo'" in opd("status", "dmeo").err


def test_status_json_is_the_documented_document(opd, example_store_once):
    status = json.loads(opd("status", "demo", "--json").out)
    assert (status["name"], status["status"]) == ("demo", "finished")
    assert [r["round"] for r in status["rounds"]] == [0, 1, 2]
    last = status["rounds"][2]
    assert set(last) == {"round", "student_sha256", "metrics", "stages"}
    assert set(last["stages"]["train"]) >= {"key", "state", "seconds", "rows", "error"}
    state = Run.open(example_store_once, "demo").state.rounds[2]
    assert last["student_sha256"] == state.student_sha256
    assert last["stages"]["rollout"]["key"] == state.stages["rollout"].key
    assert last["metrics"].items() >= state.metrics.items()
    # the run's state has no errors, as those of earlier versions: two of four prompts are right
    errors = {name: last["metrics"][f"accuracy_greedy_{name}"] for name in ("se", "n", "prompts")}
    assert errors == {"se": pytest.approx(math.sqrt(1 / 12)), "n": 4, "prompts": 4}


def test_status_shows_rounds_the_student_and_three_commands(opd, example_store_once):
    text = opd("status", "demo").out
    assert all(figure in text for figure in ("25.0%", "50.0%", "75.0%", "1.5000", "rollout 2.0"))
    (line,) = [line for line in text.splitlines() if line.startswith("student of round 2: ")]
    folder = Path(line.split(": ")[1].split("  (")[0])
    assert (folder / "model.safetensors").is_file()
    commands = text.split("next:\n")[1].splitlines()
    assert len(commands) == 3
    assert all(c.split()[0].endswith("opd") and str(example_store_once) in c for c in commands)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_terminal_cuts_nothing_off(opd, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    wide = opd("status", "demo").out
    table, lines = wide.split("round 0 is the student")[0], wide.splitlines()
    assert "…" not in table
    assert all(len(line) <= width for line in table.partition("seconds per stage")[0].splitlines()[1:])
    assert all(figure in table for figure in ("25.0%", "50.0%", "75.0%", "1.5000"))
    stages = [line for line in lines if "rollout 2.0" in line]
    assert stages and all(("supervise" in line and "train" in line) for line in stages), "on one line each"
    for command in (["ls"], ["query", "demo", "rounds"], ["compare", "demo"]):
        assert "…" not in opd(*command).out


def test_the_commands_that_status_proposes_work(opd, tmp_path):
    import shlex

    proposed = [shlex.split(c)[1:] for c in opd("status", "demo").out.split("next:\n")[1].splitlines()]
    by_name = {words[0]: words for words in proposed}
    assert opd(*by_name["export"], root=None).code == 0
    assert opd(*by_name["query"], root=None).code == 0
    assert (tmp_path / "demo-student" / "config.json").is_file()


def test_a_run_with_rewards_is_asked_for_its_groups(tmp_path):
    """It may have no teacher, and so no worst tokens."""
    for stages, question in (({}, "worst-tokens"), ({"judge": StageState(state="done")}, "groups")):
        round = RoundState(round=2, stages=stages, student_sha256="a")
        proposed = next_commands(RunState(name="demo", status="finished", rounds=[round]), tmp_path)
        assert any(f" query demo {question} " in command for command in proposed), proposed


def test_status_without_a_name_is_the_run_that_changed_last(opd, example_store):
    run = Run.open(example_store, "other")
    with run.lock():
        state = run.state
        state.updated = ""
        time.sleep(1.1)  # the stamp counts seconds
        run.save(state)
    assert json.loads(opd("status", "--json", root=example_store).out)["name"] == "other"


def test_a_run_whose_process_was_killed_is_not_shown_as_running(opd, example_store):
    run = Run.open(example_store, "demo")
    with run.lock():
        state = run.state
        state.status = "running"
        state.rounds.append(RoundState(round=3, stages={"rollout": StageState(state="running", started="now")}))
        run.save(state)
        held = json.loads(opd("status", "demo", "--json", root=example_store).out)
    assert (held["status"], held["rounds"][3]["stages"]["rollout"]["state"]) == ("running", "running")
    after = json.loads(opd("status", "demo", "--json", root=example_store).out)
    assert (after["status"], after["rounds"][3]["stages"]["rollout"]["state"]) == ("stopped", "pending")
    text = opd("status", "demo", root=example_store).out
    assert "opd resume demo" in text and "student of round 2" in text


def test_a_run_that_reached_the_requested_round_is_shown_as_paused(opd, example_store):
    run = Run.open(example_store, "other")
    with run.lock():
        state = run.state
        state.status = "stopped"
        run.save(state)
        run.save_experiment({"policy": {"rounds": 5}})
    assert "other  paused at round 1 of 5" in opd("status", "other", root=example_store).out
    assert "paused at round 1 of 5" in opd("ls", root=example_store).out
    assert json.loads(opd("status", "other", "--json", root=example_store).out)["status"] == "stopped"
    (run.directory / "experiment.yaml").write_text("damaged")
    assert "other  paused at round 1\n" in opd("status", "other", root=example_store).out
    with run.lock():
        state.rounds.append(RoundState(round=2, stages={"rollout": StageState(state="failed", error="stopped")}))
        run.save(state)
    assert "other  stopped\n" in opd("status", "other", root=example_store).out


def test_the_version_is_that_of_the_distribution(opd):
    assert opd("--version", root=None) == (0, f"opdflow {importlib.metadata.version('opdflow')}\n", "")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_states_the_exit_codes_in_a_paragraph_of_their_own(command, opd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in opd(command, "--help", root=None).out.splitlines()]
    (first,) = [number for number, line in enumerate(lines) if line.startswith("Exit codes:")]
    assert lines[first - 1] == ""


def test_a_failed_stage_is_shown_with_its_error_and_where_to_look(opd, example_store):
    run = Run.open(example_store, "demo")
    with run.lock():
        state = run.state
        state.status = "failed"
        state.rounds.append(RoundState(round=3, stages={"train": StageState(state="failed", error="loss is [nan]")}))
        run.save(state)
    text = opd("status", "demo", root=example_store).out
    assert "round 3 train: loss is [nan]" in text
    assert "opd resume demo" in text and "opd logs demo" in text


def test_logs_by_stage_and_by_number_of_lines(opd, example_store):
    run = Run.open(example_store, "demo")
    run.log_path("sampler-0").write_text("engine [bold]starts[/]\n")
    whole = opd("logs", "demo", root=example_store).out
    assert "==> train <==\nline 0\nline 1\nline 2\n" in whole and "engine [bold]starts[/]" in whole
    assert opd("logs", "demo", "--stage", "train", "-n", 1, root=example_store).out == "line 2\n"
    assert opd("logs", "demo", "--stage", "sampler", root=example_store).out == "engine [bold]starts[/]\n"
    unknown = opd("logs", "demo", "--stage", "tarin", root=example_store)
    assert unknown.code == 2 and "sampler-0, train" in unknown.err


def test_logs_have_no_secrets_and_no_half_lines(opd, example_store, monkeypatch):
    monkeypatch.setenv("A_SERVICE_PASSWORD", "correct-horse-battery-staple")
    run = Run.open(example_store, "demo")
    run.log_path("scorer").write_text("for correct-horse-battery-staple\ncorrect-ho")
    out = opd("logs", "demo", "--stage", "scorer", root=example_store).out
    assert out == f"for ***\n{CUT}\n"


def follow(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "flows.cli.app", "logs", "demo", "--follow", "--root", str(root)]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert [process.stdout.readline() for _ in range(3)] == ["line 0\n", "line 1\n", "line 2\n"]
    return process


def test_following_shows_new_lines_and_ends_with_the_run(example_store):
    run = Run.open(example_store, "demo")
    with run.lock():
        process = follow(example_store)
        with run.log_path("train").open("a") as log:
            log.write("line 3\nha")
        assert process.stdout.readline() == "line 3\n"
        with run.log_path("train").open("a") as log:
            log.write("lf\n")
        assert process.stdout.readline() == "half\n"
        run.log_path("scorer").write_text("late\n")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "==> scorer <==\nlate\n", "")


def test_ctrl_c_exits_130(example_store):
    with Run.open(example_store, "demo").lock():
        process = follow(example_store)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130


def test_query_formats_agree(opd):
    sql = "select round, count(*) as n, [1, 2] as l, null as nothing from tokens group by round order by round"
    as_json = json.loads(opd("query", "demo", sql, "--json").out)
    assert as_json == [{"round": r, "n": 15, "l": [1, 2], "nothing": None} for r in (1, 2)]
    as_csv = list(csv.DictReader(io.StringIO(opd("query", "demo", sql, "--csv").out)))
    assert as_csv == [{"round": str(r), "n": "15", "l": "[1, 2]", "nothing": ""} for r in (1, 2)]
    assert "│ 1     │ 15 │ [1, 2] │" in opd("query", "demo", sql).out


def test_query_without_a_name_covers_all_runs(opd):
    out = opd("query", "select distinct run from rollouts where run is not null order by run", "--csv").out
    assert out.split() == ["run", "demo", "other"]


def test_parts_of_characters_have_names_over_the_vocabulary_too(opd):
    """`where-they-part` calls it, and reads no tokens."""
    out = opd("query", "demo", "select part_name('\u0143') as name from vocabulary limit 1", "--csv").out
    assert out.splitlines() == ["name", "<0xAD>"]
    assert "part_name" in opd("query", "demo", "where-they-part", "other=other", "--sql").out
    assert opd("query", "demo", "where-they-part", "other=other").code == 0


def test_query_json_is_json_for_every_type(opd):
    sql = (
        "select 'nan'::float as a, '-inf'::double as b, [[0.5::double, 'inf'::double]] as c, map {'k': 1} as d,"
        " {'x': date '2020-01-02'} as e, 1.50::decimal(4, 2) as f, 'ab'::blob as g, '[red]' as h"
    )
    (row,) = json.loads(opd("query", sql, "--json").out)
    values = ["NaN", "-Infinity", [[0.5, "Infinity"]], {"k": 1}, {"x": "2020-01-02"}, "1.50", "6162", "[red]"]
    assert list(row.values()) == values
    assert "[red]" in opd("query", "select '[red]' as \"[bold]\"").out


def test_a_long_table_says_what_it_leaves_out(opd):
    out = opd("query", "select range as n from range(250)").out
    assert "│ 199 │" in out and "│ 200 │" not in out and "50 more rows" in out
    assert len(json.loads(opd("query", "select * from range(250)", "--json").out)) == 250


@pytest.mark.parametrize("args", [[], ["demo"]])
def test_query_without_sql_lists_views_and_commands_that_work(args, opd):
    import shlex

    out = opd("query", *args).out
    assert "One row per completion token" in out and len(out.splitlines()) < 30
    columns, example = (shlex.split(line.partition(": ")[2])[1:] for line in out.splitlines()[-2:])
    assert "teacher_logprob" in opd(*columns, root=None).out and "reverse_kl" in opd(*example, root=None).out
    listed = {view["view"]: view for view in json.loads(opd("query", *args, "--json").out)}
    assert "teacher_logprob" in listed["tokens"]["columns"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo", "drop view rollouts"], "DROP statement"),
        (["demo", "select nonsense from rollouts"], "nonsense"),
        (["demo", "select 1", "--json", "--csv"], "choose one"),
        (
            ["demo", "select sum(a.range * b.range) from range(9999999) a, range(9999999) b", "--limit-seconds", 0.2],
            "0.2",
        ),
        (["nope", "select 1"], "no run 'nope'"),
    ],
)
def test_refused_queries_exit_2_and_say_why(args, message, opd):
    result = opd("query", *args)
    assert result.code == 2 and result.out == "" and message in result.err


def test_usage_errors_exit_2(opd):
    assert opd("frobnicate", root=None).code == 2
    assert opd("status", "--frobnicate").code == 2


@pytest.mark.parametrize(("error", "code"), [(ConfigError("a\nb"), 2), (StoreError("a\nb"), 1), (RunBusy("a\nb"), 75)])
def test_errors_of_ours_end_with_their_code(error, code, capsys):
    with pytest.raises(SystemExit) as end, exit_codes():
        raise error
    assert end.value.code == code
    assert capsys.readouterr().err == "error: a\n  b\n"


def test_unexpected_errors_keep_their_traceback(example_store):
    state = Run.open(example_store, "demo").directory / "state.json"
    script = (
        "import sys, storage.runs\nfrom flows.cli.app import main\n"
        "storage.runs.Run.holder = lambda self: 1 / 0\nsys.argv = ['opd', *sys.argv[1:]]\nmain()"
    )
    command = [sys.executable, "-c", script, "status", "demo", "--root", str(example_store)]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr
    state.write_text("{")
    command = [sys.executable, "-m", "flows.cli.app", "status", "demo", "--root", str(example_store)]
    damaged = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=os.environ)
    assert damaged.returncode == 1 and damaged.stderr.startswith("error: ") and "Traceback" not in damaged.stderr


def test_of_a_run_the_question_groups_is_asked_though_a_view_has_the_name(opd):
    assert "all_equal" in opd("query", "groups").out
    for args in (("demo", "groups"), ("demo", "groups", "round=1")):
        assert "all_equal" not in opd("query", *args).out, args
    assert "FROM" in opd("query", "demo", "groups", "--sql").out


def test_a_views_name_where_sql_is_expected_lists_its_columns(opd):
    for args in (("demo", "tokens"), ("tokens",), ("demo", "TOKENS")):
        text = opd("query", *args).out
        assert "teacher_logprob" in text and "text_offset" in text and "grad_norm" not in text
    columns = json.loads(opd("query", "demo", "tokens", "--json").out)
    assert {"column": "position", "type": "BIGINT"}.items() <= next(
        c for c in columns if c["column"] == "position"
    ).items()
    assert opd("query", "demo", "rounds", "--csv").out.startswith("column,type,meaning\nrun,VARCHAR,")
    wrong = opd("query", "demo", "token")
    assert wrong.code == 2 and "did you mean 'tokens'" in wrong.err
    assert opd("query", "nowhere", "tokens").code == 2


@pytest.mark.parametrize(
    ("args", "root", "instead"),
    [
        (["ls"], "nothing://bucket/x", "unknown protocol 'nothing'"),
        (["ls"], "https://host/x", "a web address holds no store"),
        (["ls"], "gs://bucket/x", "pip install 'opdflow[gcs]'"),
        (["run", "c.yaml"], "gs://bucket/x", "error: gs://bucket/x: a path on this machine"),
        (["run", "c.yaml"], "gs://bucket/x", "`opd push`"),
        (["query", "select 1"], "hub:x/y", "give a folder"),
        (["status"], "file:///tmp/x", "leave out the scheme"),
        (["export", "demo", "hub:me/x"], None, "--push OWNER/NAME"),
        (["export", "demo", "hf://me/x"], None, "--push OWNER/NAME"),
        (["export", "demo", "https://x/y"], None, "absolute path"),
        (["study", "s.yaml", "--out", "s3://b/x"], None, "`opd push`"),
    ],
)
def test_what_looks_like_a_url_makes_no_folder(opd, tmp_path, args, root, instead):
    result = opd(*args, *(["--root", root] if root else []), root=None)
    assert result.code == 2 and instead in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_root_with_a_scheme_is_refused_from_the_environment_and_from_python_too(opd, tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_ROOT", "s3://bucket/x")
    assert opd("gc", root=None).code == 2
    with pytest.raises(InputError, match="s3:"):
        Store("s3://bucket/x")
    assert list(tmp_path.iterdir()) == []
    assert Store(tmp_path / "a:b").root.is_dir()  # a whole path may hold a colon


def test_compare_pairs_rounds_and_runs(opd):
    """Of four prompts 0, 1 and 2 are right in rounds 0, 1 and 2; `other` shares rounds 0 and 1."""
    found = json.loads(opd("compare", "demo", "--json").out)
    assert [(line["run"], line["other"]) for line in found] == [("demo@1", "demo@0"), ("demo@2", "demo@1")]
    accuracy = found[0]["metrics"]["accuracy_greedy"]
    assert accuracy["difference"] == accuracy["se"] == pytest.approx(0.25) and accuracy["prompts"] == 4
    assert not accuracy["told_apart"] and accuracy["low"] < 0 < accuracy["high"]
    (line,) = json.loads(opd("compare", "demo@1", "other", "--json").out)
    assert line["run"] == "other@1" and line["metrics"]["accuracy_greedy"]["difference"] == 0
    assert "not told apart" in opd("compare", "demo@2", "demo@0").out
    for wrong in (("demo@7",), ("nobody",), ("demo@x",)):
        assert opd("compare", "demo", *wrong).code == 2


def test_evaluate_refuses_a_round_that_is_not_trained(opd):
    assert opd("evaluate", "demo", "--round", 9).code == 2
    assert opd("evaluate", "nobody").code == 2
