"""The byte tokenizer loses nothing; the audit finds each kind of difference and settles it by the stated policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import checkpoint

from storage.errors import InputError
from tasks.inputs.tokenizers import (
    BYTE_SPECIALS,
    TokenizerPolicy,
    audit_tokenizers,
    build_byte_tokenizer,
    load_tokenizer,
    vocabulary_rows,
)

TOKENIZER = build_byte_tokenizer()
MASK = TokenizerPolicy(on_mismatch="mask")


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("student") / "model")


@pytest.fixture
def teacher(student, tmp_path) -> Path:
    return Path(shutil.copytree(student, tmp_path / "teacher"))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@given(st.text())
def test_every_text_is_its_utf8_bytes_and_comes_back(text):
    if any(token in text for token in BYTE_SPECIALS):
        return
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_saved_byte_tokenizer_renders_chats(student):
    loaded = load_tokenizer(student)
    text = loaded.apply_chat_template([{"role": "user", "content": "1+2="}], tokenize=False, add_generation_prompt=True)
    ids = loaded(text, add_special_tokens=False).input_ids
    assert text == "<|user|>1+2=<|end|><|assistant|>"
    assert ids == [259, *b"1+2=", 257, 260]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (257, 256)
    assert loaded.decode(ids, skip_special_tokens=True) == "1+2="


def test_vocabulary_names_every_id_once():
    rows = vocabulary_rows("student", TOKENIZER)
    assert rows["id"] == list(range(261))
    assert rows["text"][ord("A")] == "A" and rows["text"][0xC3] is None
    assert [index for index, special in zip(rows["id"], rows["special"], strict=True) if special] == [*range(256, 261)]


def test_same_tokenizer_is_identical(student):
    audit = audit_tokenizers(student, student)
    assert (audit.verdict, audit.masked_ids, audit.mismatches) == ("identical", (), 0)
    assert (audit.student.tokens, audit.student.rows) == (261, 264)
    audit.require()


def test_padding_rows_are_no_difference_of_tokens(student, tmp_path):
    audit = audit_tokenizers(student, checkpoint(tmp_path / "padded", vocab_size=320))
    assert audit.verdict == "compatible"
    assert "264 and 320 rows" in str(audit)


def test_differing_ids_are_refused_or_masked(student, teacher):
    def rename(content):
        content["added_tokens"][2]["content"] = "<|think|>"

    edit(teacher / "tokenizer.json", rename)
    refused = audit_tokenizers(student, teacher)
    assert refused.verdict == "refused"
    with pytest.raises(InputError, match=r"1 ids stand for different tokens.*on_mismatch: mask"):
        refused.require()
    masked = audit_tokenizers(student, teacher, MASK)
    assert (masked.verdict, masked.masked_ids) == ("masked", (258,))
    assert masked.mismatched[0].student == "<|system|>" and masked.mismatched[0].teacher == "<|think|>"
    assert "id 258: student '<|system|>', special; teacher '<|think|>', special: masked" in str(masked)


def test_another_end_of_sequence_masks_both_ends(student, teacher):
    edit(teacher / "tokenizer_config.json", lambda content: content.update(eos_token="<|system|>"))
    assert audit_tokenizers(student, teacher).verdict == "refused"
    audit = audit_tokenizers(student, teacher, MASK)
    assert (audit.verdict, audit.masked_ids) == ("masked", (257, 258))


def test_another_vocabulary_is_refused_even_by_mask(student, teacher):
    def rotate(content):
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {token: (index + 1) % 256 for token, index in vocabulary.items()}

    edit(teacher / "tokenizer.json", rotate)
    audit = audit_tokenizers(student, teacher, MASK)
    assert (audit.verdict, audit.mismatches, audit.masked_ids) == ("refused", 256, ())
    assert len(audit.mismatched) < 256


def test_same_ids_that_split_differently_are_refused(student, teacher):
    edit(teacher / "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(InputError, match="split differently"):
        audit_tokenizers(student, teacher, MASK).require()


@pytest.mark.parametrize("choice, renders", [("student", False), ("teacher", True)])
def test_template_difference_needs_a_choice(student, teacher, choice, renders):
    (teacher / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(InputError, match=r"chat templates differ.*on_template_mismatch"):
        audit_tokenizers(student, teacher, MASK).require()
    audit = audit_tokenizers(student, teacher, TokenizerPolicy(on_template_mismatch=choice))
    assert (audit.verdict, audit.teacher_renders) == ("compatible", renders)


def test_automatic_bos_counts_as_rendering(student, teacher):
    def add_bos(content):
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|system|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|system|>": {"id": "<|system|>", "ids": [258], "tokens": ["<|system|>"]}},
        }

    edit(teacher / "tokenizer.json", add_bos)
    assert any("BOS, EOS" in problem for problem in audit_tokenizers(student, teacher).problems)


def test_other_stop_ids_are_noted(student, teacher):
    edit(teacher / "generation_config.json", lambda content: content.update(eos_token_id=[257, 256]))
    audit = audit_tokenizers(student, teacher)
    assert audit.verdict == "compatible"
    assert audit.teacher.stop_ids == (257, 256) and "stops at [257, 256]" in str(audit)


def test_ids_past_the_rows_of_a_model_are_a_note(student, teacher):
    edit(teacher / "config.json", lambda content: content.update(vocab_size=260))
    audit = audit_tokenizers(student, teacher)
    assert audit.verdict == "compatible" and (audit.teacher.tokens, audit.teacher.rows) == (261, 260)
    assert any("the teacher's tokenizer has 261 ids, its model 260 rows" in note for note in audit.notes)


def test_folder_without_tokenizer_says_so(teacher):
    for path in teacher.glob("*token*"):
        path.unlink()
    with pytest.raises(InputError, match="a checkpoint without tokenizer"):
        load_tokenizer(teacher)
