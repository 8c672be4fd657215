"""`opd check` and bad input: what is wrong is named with file and line before an engine starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import TINY

from flows.experiment import load_experiment
from flows.run.check import check_experiment
from storage.errors import InputError


def check(tmp_path: Path, *changes: str) -> str:
    return "\n".join(check_experiment(load_experiment(TINY, list(changes)), tmp_path / "store"))


def test_a_good_config_is_described(tmp_path):
    text = check(tmp_path)
    assert (
        "tokenizers: identical" in text
        and "prompts: 32 for eval" in text
        and "in eval)" in text
        and "4 optimizer steps" in text
    )
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (None, r"prompts\.jsonl: no such prompt file"),
        (['{"prompt": "1+1="}', '{"prompt": '], r"prompts\.jsonl:2: not JSON"),
        (['{"question": "1+1="}'], r"prompts\.jsonl:1.*prompt"),
        (['{"prompt": ""}'], "none of 1 prompts is left"),
        ([json.dumps({"prompt": "9" * 100})], "none of 1 prompts is left"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(tmp_path, lines, says):
    path = tmp_path / "prompts.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=says):
        check(tmp_path, f"prompts.train={{kind: file, path: {path}}}")


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    source = f"teacher={{source: {{kind: checkpoint, path: {tmp_path / 'model'}}}, warmup: null}}"
    with pytest.raises(InputError, match="without tokenizer"):
        check(tmp_path, source)
