"""The page of `opd report`, from a small store whose texts try to leave their place."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from page_reader import URL, PageReader
from page_store import HOSTILE, add_run, commit, rollouts, stage
from typer.testing import CliRunner

from flows.cli.app import make_app
from flows.page import build, completions, curves
from flows.page.build import REASONS, page
from flows.page.completions import choose, read
from storage.artifacts.artifact import artifact_directory
from storage.errors import InputError, OpdError
from storage.query.catalog import Catalog
from storage.runs import RoundState, Run
from storage.schemas import MaskReason
from storage.store import Store
from storage.upkeep.gc import evict

SECTIONS = {"runs", "rounds", "diagnostics", "steps", "time", "prompts", "tokens", "config"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page") / "store"
    add_run(root)
    add_run(root, "other", changes=["train.lr=0.5"])
    return root


@pytest.fixture(scope="module")
def shown(root: Path) -> PageReader:
    return PageReader(page(root, ["hostile"]).html)


def run(*arguments: object, root: Path) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), ["report", *map(str, arguments), "--root", str(root)])
    if isinstance(result.exception, OpdError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_texts_of_models_stay_texts(shown: PageReader) -> None:
    assert shown.text.count(HOSTILE) >= 20  # prompts and answers, before and after
    assert len(shown.scripts) == 3 and shown.executed() == shown.allowed()
    assert not [tag for tag, _ in shown.elements if tag == "img"]
    assert HOSTILE in shown.data["words"] and "{{ 7 * 7 }}" in shown.data["words"]


def test_nothing_is_loaded_from_elsewhere(shown: PageReader) -> None:
    assert shown.loaded() == []
    script = shown.scripts[1][1]
    known = {"//www.chartjs.org", "//github.com"}  # in comments of Chart.js
    assert {found.partition(":")[2] for found in URL.findall(script)} <= known
    assert "sourceMappingURL" not in script
    assert shown.ids >= SECTIONS and "configs" not in shown.ids


def test_curves_have_errors_and_the_steps_of_the_training(shown: PageReader) -> None:
    charts = shown.data["charts"]
    by_title = {chart["title"]: chart["runs"]["hostile"] for chart in charts["rounds"]}
    kl = by_title["reverse KL (nats per token)"]
    assert [point[:2] for point in kl] == [[0, 1.0], [1, 0.5], [2, pytest.approx(1 / 3, rel=1e-5)]]
    spread = math.sqrt(sum((n / 100 - 0.145) ** 2 for n in range(30)) / 29 / 30)
    assert [point[2] for point in kl] == pytest.approx([spread] * 3, rel=1e-4)
    steps = {chart["title"]: chart["runs"]["hostile"] for chart in charts["steps"]}
    assert steps["loss"] == [[n, (n - 1) % 10 + 1] for n in range(1, 21)]
    assert steps["drift"] == [[n, 0.25] for n in range(2, 21, 2)]  # null where it was not computed
    assert charts["stages"] == [
        {
            "run": "hostile",
            "rounds": [0, 1, 2],
            "stages": {"prepare": [2.5, 0, 0], "evaluate": [2.5] * 3}
            | {label: [0, 2.5, 2.5] for label in ("rollout", "supervise", "train")},
        }
    ]


def test_a_token_has_both_models_lists_and_its_reason(shown: PageReader) -> None:
    data = shown.data
    found = data["completions"][0]
    assert found["worst"] == 1 and found["round"] == 2 and found["length"] == 8
    assert found["gap"] == pytest.approx([39 / 40] * 8, abs=1e-3)
    top = [[data["words"][word], *shares] for word, *shares in found["student_top"][0]]
    assert top == [["a", 0.5, 0.2], [" b", 0.3, 0.3], [HOSTILE, 0.1, 0.1]]
    divergence = 0.5 * math.log(0.5 / 0.2) + 0.1 * math.log(0.1 / 0.4)
    assert found["divergence"] == pytest.approx([divergence] * 8, abs=1e-3)
    ends = [data["words"][word] == "<end>" for word in found["name"]]
    assert [data["reasons"][reason] == "special token" for reason in found["reasons"]] == ends
    assert data["left_out"]["hostile"] == ["special token", "teacher prefix", "unmapped"]
    invalid = next(each for each in data["completions"] if each["id"] == "train1/2/0")
    assert invalid["gap"][0] is None and invalid["gap"][1] is not None


def test_every_mask_reason_is_explained() -> None:
    assert set(REASONS) == set(MaskReason)


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> PageReader:
    """Of a run with rewards, whose completions are shown whole."""
    root = tmp_path_factory.mktemp("rewarded") / "store"
    add_run(root, with_judge=True, changes=[JUDGE])
    add_run(root, "other", rounds=1)
    return PageReader(page(root, ["hostile", "other"]).html)


JUDGE = 'judge={"verifiers": [{"kind": "exact_match"}]}'


def test_rewards_have_curves_with_errors_and_groups_of_three_kinds(rewarded: PageReader) -> None:
    charts = rewarded.data["charts"]
    reward = next(chart for chart in charts["rewards"] if chart["title"] == "mean reward of the rollouts")
    assert reward["runs"] == {"hostile": [[1, 0.5, 0.1], [2, 0.5, 0.1]]}  # the other run was not judged
    (groups,) = charts["groups"]
    # 40 completions of 30 prompts; the two of a prompt, n and n + 30, have the same verdict
    assert groups["rounds"] == [1, 2] and set(groups["bars"]) == {"all right", "all wrong", "not judged"}
    assert groups["bars"]["all right"] == [10, 10] == groups["bars"]["all wrong"] == groups["bars"]["not judged"]
    assert "rewards" in rewarded.ids
    assert re.search(r"1 0\.519 ± 0\.1\d\d 27 13 30 10 10 0 30", rewarded.text)
    assert "Right: a reward of at least 0.5" in rewarded.text


def test_a_completion_has_its_reward_verdict_and_feedback_as_text(rewarded: PageReader) -> None:
    by_id = {(found["run"], found["id"]): found["judged"] for found in rewarded.data["completions"]}
    assert by_id["hostile", "train0/2/0"] == {"reward": 1, "right": True, "feedback": f"why {HOSTILE}"}
    assert by_id["hostile", "train1/2/0"] == {"reward": 0, "right": False, "feedback": f"why {HOSTILE}"}
    assert by_id["hostile", "train2/2/0"] == {"reward": None, "right": None, "failed": f"ended {HOSTILE}"}
    assert {judged for (run, _), judged in by_id.items() if run == "other"} == {None}
    names = {attributes.get("name") for _, attributes in rewarded.elements}
    assert names >= {"verdict", "least", "most"}


def test_long_feedback_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_run(tmp_path / "store", rounds=1, completions=3, with_judge=True)
    monkeypatch.setattr(build, "FEEDBACK", 10)
    found = PageReader(page(tmp_path / "store", ["hostile"]).html).data["completions"]
    texts = [text for each in found for name, text in each["judged"].items() if name in ("feedback", "failed")]
    assert len(texts) == 3 and all(len(text.partition(" … (")[0]) == 10 for text in texts)


def test_diagnostics_are_curves_and_a_table_and_say_what_is_missing(rewarded: PageReader) -> None:
    charts = {chart["title"]: chart for chart in rewarded.data["charts"]["diagnostics"]}
    assert charts["overlap of the top K, last step"]["runs"]["hostile"] == [[1, 0.76, None], [2, 0.77, None]]
    positions = charts["entropy by position, last round (nats)"]
    assert positions["lines"] == ["hostile student", "hostile teacher", "other student", "other teacher"]
    assert positions["runs"]["hostile student"] == [[1, 1.0], [2, 1.0], [4, 1.0], [8, 1.0]] and positions["log"]
    lengths = charts["length of right and wrong held-out answers (tokens)"]
    assert lengths["runs"]["hostile right"] == [[0, 1, 0], [1, 1, 0], [2, 1, 0]]
    p, q = (0.5, 0.3), (0.2, 0.3)
    shares = [[a / sum(of) for a in of] for of in (p, q)]
    advantage = sum(a * math.log(b / a) for a, b in zip(*shares, strict=True)) / 2
    assert f"hostile 2 3 0.667 80.0% 50.0% {advantage:.4f}" in rewarded.text
    assert (
        "other: no overlap of the rollouts' lists: the teacher's likeliest tokens (teacher_topk) are not stored"
        in rewarded.text
    )


def test_without_the_students_scores_the_page_says_why(tmp_path: Path) -> None:
    root = tmp_path / "store"
    run = add_run(root, rounds=1, completions=3, changes=["supervise.student=none"])
    store, tables = Store(root), rollouts("alone", 1, 3, 8)
    for row in tables["sampled"]:
        row["student_logprobs"] = row["student_entropy"] = None
    signals = {name: commit(store, name, "alone", {name: tables[name]}) for name in ("sampled", "mask")}
    with run.lock():
        state = run.state
        state.rounds[1].stages["supervise"] = stage(**signals)
        run.save(state)
    found = PageReader(page(root, ["hostile"]).html)
    (positions,) = [c for c in found.data["charts"]["diagnostics"] if c["title"].startswith("entropy by position")]
    assert positions["lines"] == ["teacher"]
    assert "no entropy of the student: the student did not score (supervise.student: none)" in found.text
    assert "(student_topk) are not stored and" in found.text and "rewards" not in found.ids
    assert all(each["judged"] is None for each in found.data["completions"])


def test_runs_side_by_side(root: Path) -> None:
    found = PageReader(page(root, ["hostile", "other", "hostile"]).html)
    assert found.data["names"] == ["hostile", "other"]
    assert all(set(chart["runs"]) == {"hostile", "other"} for chart in found.data["charts"]["rounds"])
    assert re.search(r"train\.lr 0\.001 0\.5", found.text) and "other@2 - hostile@2" in found.text
    assert re.search(r"difference accuracy reverse KL prompts other@2 - hostile@2 .* not told apart 30", found.text)
    assert "configs" in found.ids and {c["run"] for c in found.data["completions"]} == {"hostile", "other"}


def test_a_single_fork_is_compared_with_its_parent(tmp_path: Path) -> None:
    root = tmp_path / "store"
    run = add_run(root, rounds=1, completions=1)
    parent = run.experiment
    with run.lock():
        mine = parent | {"train": parent["train"] | {"lr": 0.25}}
        run.save_experiment(mine | {"fork": {"run": "first", "round": 1, "experiment": parent}})
    found = PageReader(page(root, ["hostile"]).html)
    assert "config field hostile first (forked at round 1) train.lr 0.25 0.001" in found.text


def test_the_sample_is_stated_and_the_same_in_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    run = add_run(root, rounds=1, completions=90, length=20)
    monkeypatch.setattr(build, "TOKENS", 400)
    monkeypatch.setattr(build, "LONGEST", 10)
    one, two = (page(root, ["hostile"]).html for _ in range(2))
    found = PageReader(one)
    assert found.tokens() == PageReader(two).tokens() and len(found.tokens()) == 400
    assert "40 of 90 completions, 400 of 1,800 tokens: the 20 with the largest mean gap and 20 by" in found.text
    assert "of longer completions the first 10 tokens" in found.text
    worst = [c["id"] for c in found.data["completions"] if c["worst"]]
    assert worst == [f"train{n % 30}/1/{n // 30}" for n in range(89, 69, -1)]
    sample = choose(Catalog(Store(root), run), 1, 1_000_000, 10)
    assert len(sample.ids) == sample.completions == 90


def test_a_page_that_is_too_large_gets_fewer_tokens(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = page(root, ["hostile"]).html
    monkeypatch.setattr(build, "MOST_BYTES", len(whole) - 1)
    monkeypatch.setattr(build, "TOKENS", 800)
    smaller = page(root, ["hostile"]).html
    assert len(smaller) < len(whole)
    assert 0 < len(PageReader(smaller).tokens()) < len(PageReader(whole).tokens())


def test_long_curves_are_means_over_equally_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    add_run(root, rounds=1, completions=1, step_count=95)
    monkeypatch.setattr(curves, "POINTS", 10)
    found = PageReader(page(root, ["hostile"]).html)
    loss = next(chart for chart in found.data["charts"]["steps"] if chart["title"] == "loss")["runs"]["hostile"]
    assert loss == [*([n, n - 4.5] for n in range(10, 91, 10)), [95, 93.0]]
    assert "95 steps, each point is the mean of 10" in found.text


def test_a_run_that_is_going_on_and_removed_rollouts(tmp_path: Path) -> None:
    root = tmp_path / "store"
    run = add_run(root)
    with run.lock():
        state = run.state
        state.status = "running"
        state.rounds.append(RoundState(round=3, stages={"rollout": stage("running")}))
        run.save(state)
        going = PageReader(page(root, ["hostile"]).html)
    assert "round 3 rollout" in going.text and "still going" in going.text
    assert {c["round"] for c in going.data["completions"]} == {1, 2}
    evict(artifact_directory(root, "rollout", state.rounds[1].stages["rollout"].artifacts["rollout"]))
    gone = PageReader(page(root, ["hostile"]).html)
    assert {c["round"] for c in gone.data["completions"]} == {2}
    assert "round 1: the rollouts or their signals were removed" in gone.text


def test_rollouts_that_nobody_scored_are_shown_without_colours(tmp_path: Path) -> None:
    root = tmp_path / "store"
    run = add_run(root, rounds=1)
    with run.lock():
        state = run.state
        del state.rounds[1].stages["supervise"]
        run.save(state)
    found = PageReader(page(root, ["hostile"]).html)
    assert "40 of 40 completions, 320 of 320 tokens; the models have not scored them" in found.text
    assert all(c["gap"] is None and c["teacher"] is None for c in found.data["completions"])


def test_several_teachers_have_figures_of_their_own(tmp_path: Path) -> None:
    root = tmp_path / "store"
    run = add_run(root, rounds=0)
    with run.lock():
        state = run.state
        state.rounds[0].metrics |= {
            f"{name}/{teacher}": 0.5 for name in ("eval_tokens", "reverse_kl") for teacher in ("math", "code")
        }
        run.save(state)
    assert (
        "By teacher round teacher reverse KL 0 code 0.5000 0 math 0.5000"
        in PageReader(page(root, ["hostile"]).html).text
    )


def test_before_any_evaluation_and_without_rollouts(tmp_path: Path) -> None:
    root = tmp_path / "store"
    run = add_run(root, rounds=0)
    found = PageReader(page(root, ["hostile"]).html)
    assert "No finished rollouts yet" in found.text and "No training steps yet" in found.text
    assert "Two evaluated rounds are needed" in found.text and "filters" not in found.ids
    with run.lock():
        state = run.state
        state.rounds[0].student_sha256 = None
        run.save(state)
    with pytest.raises(InputError, match=r"no finished round yet.*opd status hostile"):
        page(root, ["hostile"])


def test_read_gives_completions_in_the_order_of_their_ids(root: Path) -> None:
    catalog = Catalog(Store(root), Run.open(root, "hostile"))
    found = read(catalog, 1, ["train3/1/0", "none/1/0", "train0/1/0"], top=2, longest=4)
    assert [row["sample_id"] for row in found] == ["train3/1/0", "train0/1/0"]
    assert [len(row["tokens"]) for row in found] == [4, 4] and len(found[0]["tokens"][0]["student_top"]) == 2


def test_entries_of_lists_are_named_as_tokens_are(tmp_path: Path) -> None:
    """Of a byte-level vocabulary the name of a lone byte is another character, which nothing of the text has."""
    store = Store(tmp_path / "store")
    words = {0: ("Þ", None), 1: ("Ġa", " a"), 2: ("<0xE4>", None), 3: ("odd\u2603", None)}
    vocabulary = [
        {"tokenizer": "student", "id": id, "token": token, "text": text, "special": False}
        for id, (token, text) in words.items()
    ]
    commit(store, "prepare", 0, {"vocabulary": vocabulary, "prompts": []})
    found = completions.names_of(Catalog(store), [{"teacher": [[0, 1], [2, 3]], "student": None}])
    assert found == {0: "<0xDE>", 1: " a", 2: "<0xE4>", 3: "odd\u2603"}


def test_the_command_writes_a_file_and_replaces_only_its_own(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("hostile", root=root)[0] == 0 and Path("report-hostile.html").exists()
    first = Path("report-hostile.html").read_bytes()
    assert run("hostile", "--compare", "other", root=root)[0] == 0
    assert Path("report-hostile.html").read_bytes() != first
    assert run("hostile", "--compare", "other", "-o", "a.html", root=root)[0] == 0
    assert run("hostile", "other", "-o", "b.html", root=root)[0] == 0
    pages = [PageReader(Path(name).read_bytes()).data["names"] for name in ("a.html", "b.html")]
    assert pages == [["hostile", "other"]] * 2
    Path("mine.html").write_text("<html>mine")
    code, text = run("hostile", "-o", "mine.html", root=root)
    assert code == 2 and "--force" in text and Path("mine.html").read_text() == "<html>mine"
    assert run("hostile", "-o", "mine.html", "--force", root=root)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hostil"], "did you mean 'hostile'"),
        (["hostile", "--compare", "othr"], "did you mean 'other'"),
        (["hostile", "-o", "no/such/x.html"], "no folder"),
        (["hostile", "-o", "."], "a folder"),
        (["hostile", "-o", "s3://bucket/x.html"], "s3:"),
        (["hostile", *(f"r{n}" for n in range(30))], "at most"),
    ],
    ids=["unknown", "unknown beside", "no folder", "a folder", "url", "too many"],
)
def test_bad_input_is_refused(root: Path, tmp_path: Path, monkeypatch, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = run(*arguments, root=root)
    assert code == 2 and said in text and list(tmp_path.iterdir()) == []


def test_gaps_are_coloured_as_on_a_terminal() -> None:
    from flows.cli.show import SHADES

    assert {shade for shade, _ in SHADES} == {*completions.GAPS, -completions.GAPS[0], float("-inf")}
