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


MERGE = TokenizerPolicy(stop_ids="merge")


def ends_with(teacher: Path, token: str) -> None:
    """Give a copy of the student another end of sequence, in tokenizer and generation config."""
    edit(teacher / "tokenizer_config.json", lambda content: content.update(eos_token=token))
    index = TOKENIZER.convert_tokens_to_ids(token)
    edit(teacher / "generation_config.json", lambda content: content.update(eos_token_id=[index]))


def test_other_ends_of_sequence_are_merged(student, teacher):
    ends_with(teacher, "<|system|>")
    refused = audit_tokenizers(student, teacher)
    with pytest.raises(InputError, match=r"sequences end with .*stop_ids: merge"):
        refused.require()
    audit = audit_tokenizers(student, teacher, MERGE)
    assert (audit.verdict, audit.stop_ids, audit.masked_ids) == ("merged", (257, 258), ())
    assert audit.record()["stop_ids"] == [257, 258] and audit.record()["policy"]["stop_ids"] == "merge"
    text = str(audit)
    assert "completions of the student end with 257 '<|end|>', special" in text
    assert "completions of the teacher end with 258 '<|system|>', special" in text
    assert "these ids are merged" in text and not audit.warnings


def test_masked_ends_warn_that_nothing_teaches_when_to_stop(student, teacher):
    ends_with(teacher, "<|system|>")
    for policy in (MASK, TokenizerPolicy(stop_ids="mask")):
        audit = audit_tokenizers(student, teacher, policy)
        assert (audit.verdict, audit.masked_ids, audit.stop_ids) == ("masked", (257, 258), ())
        assert "nothing teaches the student when to stop" in str(audit) and "stop_ids: merge" in audit.warnings[0]


def test_equal_ends_have_nothing_to_merge(student, teacher):
    audit = audit_tokenizers(student, teacher, MERGE)
    assert (audit.verdict, audit.stop_ids) == ("identical", ())
    edit(teacher / "generation_config.json", lambda content: content.update(eos_token_id=[257, 256]))
    audit = audit_tokenizers(student, teacher, MERGE)
    assert (audit.verdict, audit.stop_ids) == ("merged", (257, 256))
    assert not any("the rollout's stop ids decide" in note for note in audit.notes)


def test_an_end_that_is_ordinary_text_of_the_other_is_not_merged(student, teacher):
    edit(teacher / "generation_config.json", lambda content: content.update(eos_token_id=[257, 10]))
    for pair, whose in (((student, teacher), "teacher"), ((teacher, student), "student")):
        with pytest.raises(InputError, match=rf"id 10 ends completions of the {whose}, but is ordinary text"):
            audit_tokenizers(*pair, MERGE).require()


def test_an_end_past_the_rows_of_the_other_model(student, tmp_path):
    """The teacher's may be: its mass counts, and nobody samples it. The student's own must be among the teacher's rows."""
    larger = checkpoint(tmp_path / "larger", vocab_size=320)

    def add(content):
        added = {**content["added_tokens"][-1], "id": 300, "content": "<|stop|>"}
        content["added_tokens"] += [
            {**added, "id": index, "content": f"<|fill{index}|>"} for index in range(261, 300)
        ] + [added]

    edit(larger / "tokenizer.json", add)
    edit(larger / "generation_config.json", lambda content: content.update(eos_token_id=[300]))
    edit(larger / "tokenizer_config.json", lambda content: content.update(eos_token="<|stop|>"))
    policy = TokenizerPolicy(on_mismatch="mask", stop_ids="merge")
    audit = audit_tokenizers(student, larger, policy)
    assert (audit.verdict, audit.stop_ids, 300 in audit.masked_ids) == ("masked", (257, 300), False)
    assert "id 261: student no token (a padding row); teacher '<|fill261|>', special: masked" in str(audit)
    assert "support_exclude_ids: [261]" in str(audit)
    assert "300 '<|stop|>', special" in str(audit)
    assert "id 264: student no token and no row; teacher '<|fill264|>', special: never sampled" in str(audit)
    with pytest.raises(InputError, match="past the teacher's 264 rows"):
        audit_tokenizers(larger, student, policy).require()


def test_many_tokens_that_only_one_has_are_no_other_vocabulary(student, teacher):
    """As long as text is split alike."""

    def extend(content):
        last = content["added_tokens"][-1]
        content["added_tokens"] += [{**last, "id": 261 + n, "content": f"<|tool{n}|>"} for n in range(20)]

    edit(teacher / "tokenizer.json", extend)
    audit = audit_tokenizers(student, teacher, MASK)
    assert (audit.verdict, len(audit.masked_ids)) == ("masked", 20)

    def merges(content):
        names = [("t", "h"), ("h", "e"), *((chr(97 + n), chr(98 + n)) for n in range(18))]
        content["added_tokens"] = content["added_tokens"][:5]
        content["model"]["vocab"] |= {a + b: 261 + n for n, (a, b) in enumerate(names)}
        content["model"]["merges"] = [list(pair) for pair in names]

    edit(teacher / "tokenizer.json", merges)
    with pytest.raises(InputError, match=r"two vocabularies.*no log-probability under the other"):
        audit_tokenizers(student, teacher, MASK).require()


def test_special_tokens_of_two_names_are_mapped(student, teacher):
    def rename(content):
        content["added_tokens"][2]["content"] = "<|think|>"

    edit(teacher / "tokenizer.json", rename)
    audit = audit_tokenizers(student, teacher, TokenizerPolicy(on_mismatch="map"))
    assert (audit.verdict, audit.masked_ids, audit.mismatches) == ("compatible", (), 1)
    assert "special; teacher '<|think|>', special: mapped" in str(audit)
    assert "map keeps it" in str(audit_tokenizers(student, teacher))


def test_a_name_at_two_ids_is_not_mapped(student, teacher):
    def swap(content):
        first, second = content["added_tokens"][2], content["added_tokens"][3]
        first["content"], second["content"] = second["content"], first["content"]

    edit(teacher / "tokenizer.json", swap)
    audit = audit_tokenizers(student, teacher, TokenizerPolicy(on_mismatch="map"))
    assert (audit.verdict, audit.masked_ids) == ("masked", (258, 259))
    assert "('<|system|>' is id 259 of the teacher, '<|user|>' is id 259 of the student" in str(audit)


def test_what_is_stored_of_an_audit_has_no_field_that_0_1_0_had_not(student, teacher):
    """The record's digest enters keys of `mask`."""
    edit(teacher / "tokenizer_config.json", lambda content: content.update(eos_token="<|system|>"))
    record = audit_tokenizers(student, teacher, MASK).record()
    assert record.keys() == {
        "student", "teacher", "policy", "mismatches", "mismatched", "verdict", "problems", "notes", "masked_ids",
        "teacher_renders",
    }  # fmt: skip
    assert record["policy"] == {"on_mismatch": "mask", "on_template_mismatch": "refuse"}
    assert record["notes"] == [
        "sequences end with '<|end|>' (id 257) for the student, '<|system|>' (id 258) for the teacher: 2 ids are masked"
    ]


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
