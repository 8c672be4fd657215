"""`opd init`: the config that it writes passes `opd check`, says what the files say, and overwrites nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from families import family, prompt_files, rewrite

from flows.cli.app import main
from flows.config_file import CONFIGS
from flows.experiment import load_experiment
from flows.run.check import check_experiment


@pytest.fixture
def init(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["opd", "init", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out + err

    return call


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return family(folder / "small", "qwen3"), family(folder / "large", "qwen3", seed=1, max_position_embeddings=200)


def rows(file: Path, *columns: str, count: int = 50) -> Path:
    lines = [json.dumps({name: f"{name} {i}" for name in columns}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_what_it_writes_passes_the_check(init, models, tmp_path):
    """Names of columns, held-out rows, positions and stop ids are those of the files."""
    file = rows(tmp_path / "data.jsonl", "question", "final_answer", "source")
    code, said = init("--student", models[0], "--teacher", models[1], "--prompts", file, "-o", "mine/first.yaml")
    assert code == 0 and "opd check mine/first.yaml" in said
    assert "prompt is question, answer is final_answer" in said
    experiment = load_experiment(tmp_path / "mine" / "first.yaml", [])
    train, held_out = experiment.prompts.train, experiment.prompts.eval
    assert train.columns == {"prompt": "question", "answer": "final_answer"} and train.path == file
    assert held_out.path == file and held_out.limit == 10
    assert experiment.evaluate.verifier.kind == "math_verify"
    # the teacher has 200 positions
    assert experiment.prompts.max_prompt_length + experiment.rollout.max_completion_length <= 200
    assert experiment.rollout.prompts_per_round == 32 and experiment.supervise.student == "none"
    lines = list(check_experiment(experiment, tmp_path / "store"))
    assert "prompts: 10 for eval" in lines and any(line.startswith("prompts: 40 for train") for line in lines)
    assert [line for line in lines if "warning" in line and "'source' is not read" not in line] == []


def test_a_held_out_file_and_prompts_without_answers(init, models, tmp_path):
    file = rows(tmp_path / "train.jsonl", "prompt", count=7)
    held_out = rows(tmp_path / "eval.jsonl", "text", count=3)
    code, _ = init("--student", models[0], "--teacher", models[0], "--prompts", file, "--eval", held_out)
    assert code == 0
    experiment = load_experiment(tmp_path / "experiment.yaml", [])
    assert experiment.prompts.eval.columns == {"prompt": "text"} and experiment.evaluate.verifier is None
    assert experiment.rollout.prompts_per_round == 4 and experiment.train.samples_per_step == 4
    code, said = init("--student", models[0], "--teacher", models[0], "--prompts", file)
    assert code == 2 and "experiment.yaml: exists" in said
    assert load_experiment(tmp_path / "experiment.yaml", []) == experiment


def test_tokenizers_that_differ_get_the_policy_that_fits(init, models, tmp_path):
    other = family(tmp_path / "other", "qwen3", seed=2)
    rewrite(other / "generation_config.json", eos_token_id=[256, 257])
    rewrite(other / "config.json", eos_token_id=256)
    code, said = init("--student", models[0], "--teacher", other, "--prompts", prompt_files(tmp_path))
    assert code == 0, said
    assert load_experiment(tmp_path / "experiment.yaml", []).prompts.tokenizers.stop_ids == "merge"


def test_conversations_that_end_with_an_answer(init, models, tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(
        "".join(json.dumps({"conversations": [*turns[:1], turns[1] | {"value": f"{i}"}]}) + "\n" for i in range(9))
    )
    code, said = init("--student", models[0], "--teacher", models[0], "--prompts", file)
    assert code == 0, said
    train = load_experiment(tmp_path / "experiment.yaml", []).prompts.train
    assert train.columns == {"messages": "conversations"} and train.last_turn_is_completion


def test_a_gpu_gets_bfloat16_and_hub_models_their_revision(init, models, tmp_path):
    file = rows(tmp_path / "train.jsonl", "prompt", "answer", count=3000)
    code, said = init(
        "--student", "Qwen/Qwen3-0.6B@0123abc", "--teacher", models[1], "--prompts", file, "--device", "cuda"
    )
    assert code == 0, said
    experiment = load_experiment(tmp_path / "experiment.yaml", [])
    assert experiment.student.source.repo == "Qwen/Qwen3-0.6B" and experiment.student.source.revision == "0123abc"
    parts = (experiment.rollout, experiment.supervise, experiment.train, experiment.evaluate)
    assert {part.dtype for part in parts} == {"bfloat16"} and experiment.runtime.device == "cuda"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"--student": "nowhere"}, "--student nowhere: no such folder"),
        ({"--teacher": "Qwen/Qwen3-8B"}, "a model of the Hub is OWNER/NAME@COMMIT"),
        ({"--teacher": "."}, "no config.json in this folder"),
        ({"--prompts": "gone.jsonl"}, "gone.jsonl: no such prompt file"),
        ({"--prompts": "single.jsonl"}, "has one row"),
        ({"--prompts": "odd.jsonl"}, "none of its columns (colour) is known to hold prompts"),
    ],
)
def test_what_cannot_be_read_is_refused_and_nothing_written(init, models, tmp_path, args, said):
    rows(tmp_path / "odd.jsonl", "colour")
    rows(tmp_path / "single.jsonl", "prompt", count=1)
    given = {"--student": models[0], "--teacher": models[1], "--prompts": prompt_files(tmp_path)} | args
    code, shown = init(*(part for pair in given.items() for part in pair))
    assert code == 2 and said in shown.replace("\n", " ")
    assert not (tmp_path / "experiment.yaml").exists()


def test_a_recipe_is_named_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_path = load_experiment(CONFIGS / "recipes" / "gkd.yaml", [])
    assert load_experiment(Path("recipe:gkd"), []) == by_path
    (tmp_path / "mine.yaml").write_text("base: recipe:gkd\nseed: 7\n")
    assert load_experiment(tmp_path / "mine.yaml", []) == by_path.model_copy(update={"seed": 7})
