"""A completion's tokens are those that follow its prompt; BOS in a text is noticed; templates are rendered at a kept time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from shipped_tokenizers import SMALL_JSON, folder, small_bpe
from small_models import Bench
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from storage.errors import InputError
from storage.store import Store
from tasks.inputs.completions import continued, depends_on_context
from tasks.inputs.prompts import PrepareConfig
from tasks.inputs.shipped import load_tokenizer
from tasks.inputs.templates import ClockRead, reads_clock, render
from tasks.prepare import Prepared, prepare

TEMPLATE = "{% for m in messages %}[I]{{ m.content }}{% endfor %}[/I]"


def model(place: Path, file: Tokenizer, template: str | None = None, **config: Any) -> Path:
    made = folder(place, {}, config, "mistral")
    file.save(str(made / "tokenizer.json"))
    if template is not None:
        (made / "chat_template.jinja").write_text(template)
    return made


def rows(tmp_path: Path, place: Path, lines: list[dict[str, Any]], **fields: Any) -> Prepared:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = PrepareConfig.model_validate({"warmup": {"kind": "file", "path": str(path)}, **fields})
    return prepare(config, place, {}, Bench(Store(tmp_path / "store")).context)


@pytest.fixture
def metaspace(tmp_path) -> Path:
    return model(tmp_path / "metaspace", SMALL_JSON["metaspace"](), TEMPLATE, eos_token="</s>", bos_token="<s>")


@pytest.fixture
def bpe(tmp_path) -> Path:
    return model(tmp_path / "bpe", small_bpe(), "<|user|>{{ messages[0].content }}<|end|>", eos_token="<|end|>")


# --- completions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, tokens", [("46", ["4", "6"]), (" 46", ["\u2581", "4", "6"]), ("the", ["th", "e"])]
)
def test_no_space_is_put_before_a_completion(metaspace, tmp_path, completion, tokens):
    made = rows(tmp_path, metaspace, [{"prompt": "12+34=", "completion": completion}])
    ids = made.prompts["completion_token_ids"].to_pylist()[0]
    assert load_tokenizer(metaspace).convert_ids_to_tokens(ids) == [*tokens, "</s>"]
    assert made.warnings == []


def test_a_plain_prompt_and_its_completion_are_one_text(metaspace, tmp_path):
    made = rows(tmp_path, metaspace, [{"prompt": "12+34=", "completion": "46"}], chat_template=False)
    (row,) = made.prompts.to_pylist()
    whole = Tokenizer.from_file(str(metaspace / "tokenizer.json")).encode("12+34=46").ids
    assert [*row["token_ids"], *row["completion_token_ids"][:-1]] == whole


def test_a_token_across_the_boundary_is_reported_with_its_row(bpe, tmp_path):
    lines = [{"prompt": "a the", "completion": "re"}, {"prompt": "one:", "completion": "two"}]
    assert len(load_tokenizer(bpe).tokenize("there")) < len(load_tokenizer(bpe).tokenize("the")) + 1
    made = rows(tmp_path, bpe, lines, chat_template=False, append_eos=False)
    (warning,) = made.warnings
    assert "rows.jsonl:1" in warning and "rows.jsonl:2" not in warning
    loaded = load_tokenizer(bpe)
    for row, line in zip(made.prompts.to_pylist(), lines, strict=True):
        assert loaded.decode(row["token_ids"] + row["completion_token_ids"]) == line["prompt"] + line["completion"]


def test_bos_and_eos_that_the_file_adds_do_not_hide_the_boundary(tmp_path):
    file = small_bpe()
    file.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|pad|>", special_tokens=[("<|user|>", 401), ("<|pad|>", 402)]
    )
    place = model(tmp_path / "a", file, eos_token="<|end|>")
    made = rows(tmp_path, place, [{"prompt": "one two:", "completion": " three"}], chat_template=False)
    (row,) = made.prompts.to_pylist()
    assert row["completion_token_ids"] == [*file.encode(" three", add_special_tokens=False).ids, 400]
    assert made.warnings == []


def test_completions_of_many_rows_are_cut_one_by_one(metaspace):
    loaded = load_tokenizer(metaspace)
    pairs = [(f"{n}=", f"{n * n}") for n in range(50)]
    for (prompt, completion), (tokens, whole) in zip(pairs, continued(loaded, pairs), strict=True):
        assert whole and loaded.decode(loaded(prompt).input_ids + tokens) == prompt + completion


def test_only_a_tokenizer_that_looks_at_the_context_is_marked(metaspace, bpe, tmp_path):
    config = PrepareConfig.model_validate({"warmup": {"kind": "addition", "count": 1}})
    plain = config.model_copy(update={"chat_template": False})
    assert depends_on_context(metaspace, config, tmp_path / "memo") and depends_on_context(metaspace, plain, None)
    assert not depends_on_context(bpe, config, tmp_path / "memo")  # a special token ends the prompt
    assert not depends_on_context(bpe, plain, tmp_path / "memo")  # where a token spans, the tokens are those alone
    symbols = {symbol: n for n, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_alone = Tokenizer(models.BPE(vocab=symbols, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_alone.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    assert not depends_on_context(model(tmp_path / "bytes", bytes_alone, eos_token="<|end|>"), plain, None)


# --- BOS in the text ----------------------------------------------------------------------------------------------------


def adding_bos() -> Tokenizer:
    file = small_bpe()
    file.post_processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 401)])
    return file


@pytest.mark.parametrize(
    "template, fields, field",
    [
        (None, {"chat_template": False}, "prompts.add_special_tokens"),
        ("<|user|>{{ messages[0].content }}", {}, "chat template adds another"),
        ("{{ messages[0].content }}", {}, "prompts.chat_template"),
    ],
)
def test_bos_in_a_text_that_gets_one_is_reported(tmp_path, template, fields, field):
    place = model(tmp_path / "a", adding_bos(), template, eos_token="<|end|>", bos_token="<|user|>")
    lines = [{"prompt": f"<|user|>rendered {n}", "completion": "x"} for n in range(5)] + [
        {"prompt": "x", "completion": "y"}
    ]
    (warning,) = rows(tmp_path, place, lines, **fields).warnings
    assert field in warning and "rows.jsonl:1," in warning and "2 more rows" in warning


def test_bos_once_is_no_warning(tmp_path):
    place = model(tmp_path / "a", adding_bos(), eos_token="<|end|>", bos_token="<|user|>")
    lines = [{"prompt": "<|user|>rendered", "completion": "x"}]
    made = rows(tmp_path, place, lines, chat_template=False, add_special_tokens=False)
    assert made.warnings == [] and made.prompts["token_ids"].to_pylist()[0].count(401) == 1


# --- the clock ------------------------------------------------------------------------------------------------------------

CLOCKS = {
    "plain": "{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[0].content }}",
    "llama 3": "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}Today: {{ date_string }}. {{ messages[-1].content }}",
    "without a system message": "{% if messages[0].role != 'system' %}{{ strftime_now('%Y-%m-%d') }}{% endif %}"
    "{{ messages[-1].content }}",
    "only after an answer": "{% if messages | length > 2 %}{{ strftime_now('%Y') }}{% endif %}{{ messages[-1].content }}",
    "no system allowed": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ strftime_now('%j') }}",
}


@pytest.mark.parametrize("kind", CLOCKS)
def test_a_template_that_reads_the_clock_is_found(tmp_path, kind):
    assert reads_clock(load_tokenizer(model(tmp_path / "a", small_bpe(), CLOCKS[kind])), {})


@pytest.mark.parametrize(
    "template, arguments",
    [
        ("{{ messages[0].content }}", {}),
        (CLOCKS["llama 3"], {"date_string": "1 Jan 2000"}),
        ("{% set now = strftime_now('%Y') %}{{ messages[0].content }}", {}),
        ("{{ raise_exception('never') }}{{ strftime_now('%Y') }}", {}),
        (None, {}),
    ],
)
def test_a_template_that_prints_no_time_is_not(tmp_path, template, arguments):
    assert not reads_clock(load_tokenizer(model(tmp_path / "a", small_bpe(), template)), arguments)


def test_the_rendering_is_that_of_its_date(tmp_path):
    place = model(tmp_path / "a", small_bpe(), CLOCKS["llama 3"], eos_token="<|end|>")
    lines = [{"prompt": "hi", "completion": "x"}]
    texts = {
        day: rows(tmp_path, place, lines, date=day).prompts["text"][0].as_py()
        for day in ("2026-01-31", "2026-01-31T23:59:00", "2025-12-01")
    }
    assert texts["2026-01-31"] == texts["2026-01-31T23:59:00"] == "Today: 31 Jan 2026. hi"
    assert texts["2025-12-01"] == "Today: 01 Dec 2025. hi"


def test_without_a_date_a_time_is_never_printed(tmp_path):
    place = model(
        tmp_path / "a", small_bpe(), "{% if 'when' in messages[0].content %}{{ strftime_now('%Y') }}{% endif %}x"
    )
    loaded = load_tokenizer(place)
    assert not reads_clock(loaded, {}) and render(loaded, [{"role": "user", "content": "what"}], date=None) == "x"
    with pytest.raises(ClockRead):
        render(loaded, [{"role": "user", "content": "when"}], date=None)
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*prompts\.date"):
        rows(tmp_path, place, [{"prompt": "when?", "completion": "x"}], append_eos=False)


@pytest.mark.parametrize("template", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_a_template_that_draws_is_refused(tmp_path, template):
    place = model(tmp_path / "a", small_bpe(), template)
    with pytest.raises(InputError, match="random values"):
        rows(tmp_path, place, [{"prompt": "x", "completion": "x"}], append_eos=False)


@pytest.mark.parametrize(
    "date, kept", [("2026-01-31", "2026-01-31"), (__import__("datetime").date(2026, 1, 31), "2026-01-31")]
)
def test_a_date_is_kept_as_text(date, kept):
    assert PrepareConfig(eval={"kind": "addition", "count": 1}, date=date).date == kept


def test_what_is_no_date_is_refused():
    with pytest.raises(ValidationError, match="write 2026-01-31"):
        PrepareConfig(eval={"kind": "addition", "count": 1}, date="31.1.2026")


# --- keys -----------------------------------------------------------------------------------------------------------------


def test_a_folder_read_otherwise_has_keys_of_its_own_and_no_other_has(tmp_path):
    from small_models import checkpoint

    from tasks.inputs.models import CheckpointModel, model_work
    from tasks.prepare import prepare_work
    from tasks.rollout import RolloutConfig, rollout_work

    plain = checkpoint(tmp_path / "plain")
    other = Path(shutil.copytree(plain, tmp_path / "other"))
    config = json.loads((other / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    bench = Bench(Store(tmp_path / "store"))
    prompts = PrepareConfig.model_validate({"train": {"kind": "addition", "count": 4}})
    for folder_, marked in ((plain, False), (other, True)):
        student = bench.build(model_work(CheckpointModel(path=folder_), 0))
        before, now = (prepare_work(prompts, student, student, store=store) for store in (None, bench.store))
        assert (before.outputs["prepare"].key != now.outputs["prepare"].key) == marked
        made = bench.build(now)
        assert ("tokenizer_loading" in made.content) == marked
        rollout = rollout_work(
            RolloutConfig(prompts_per_round=2, max_completion_length=4), student=student, prompts=made, seed=0, round=1
        )
        assert ("tokenizer_loading" in rollout.outputs["rollout"].inputs) == marked
        assert made.meta["changed_since_0_1"].keys() == ({"tokenizer_loading"} if marked else set())
