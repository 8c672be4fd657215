"""Tasks of lm-eval in a folder, with data of their own: nothing asks a network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="requirements/lm-eval.txt is not installed (make test-full)"
)
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""


def write_choices(folder: Path, name: str, count: int) -> None:
    """The task `sums_NAME`: to choose the sum of a number and itself, for the numbers below `count`."""
    data = folder / f"{name}.jsonl"
    rows = [{"question": f"{n}+{n}=", "choices": [str(2 * n), str(n)], "label": n % 2} for n in range(count)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(CHOICE.format(name=f"sums_{name}", data=data))
