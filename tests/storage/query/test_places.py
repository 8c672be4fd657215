"""Where tokens stand in a text: byte-level and sentencepiece vocabularies, parts of characters, invalid bytes."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from storage.query.places import Pieces, part_names, places_of
from tasks.inputs.tokenizers import build_byte_tokenizer, vocabulary_rows

BYTES = build_byte_tokenizer()


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces are part of the words, bytes have tokens of their own, and a text's first space is stripped."""
    words = {"<unk>": 0, "\u2581the": 1, "\u2581cat": 2, "s": 3, "\u2581": 4}
    model = models.BPE(words | {f"<0x{n:02X}>": 5 + n for n in range(256)}, [], byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def texts_of(tokenizer, ids: list[int]) -> list[str] | None:
    """The characters of the completion at which each token stands."""
    rows = vocabulary_rows("student", tokenizer)
    pieces = Pieces(*(rows[name] for name in ("id", "token", "text", "special")))
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    columns = [["demo"]], [pa.array([ids], pa.list_(pa.int32()))], [[text]]
    (place,) = places_of(lambda run: pieces)(*map(pa.chunked_array, columns)).to_pylist()
    if place is None:
        return None
    return [text[start : start + length] for start, length in zip(place["start"], place["length"], strict=True)]


def byte_ids(text: str) -> list[int]:
    return BYTES(text, add_special_tokens=False).input_ids


def test_the_bytes_of_a_character_stand_at_the_character():
    assert texts_of(BYTES, byte_ids("aé日")) == ["a", "é", "é", "日", "日", "日"]


def test_special_tokens_take_no_text_and_disturb_none():
    (end,) = (i for i, token in BYTES.added_tokens_decoder.items() if token.content == "<|end|>")
    assert texts_of(BYTES, [*byte_ids("a"), end, *byte_ids("b")]) == ["a", "", "b"]


def test_a_character_that_was_cut_off_is_one_replacement():
    assert texts_of(BYTES, byte_ids("a日")[:-1]) == ["a", "\ufffd", "\ufffd"]
    assert texts_of(BYTES, [*byte_ids("日")[:1], *byte_ids("xé")]) == ["\ufffd", "x", "é", "é"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(byte_ids("a \né日😀")), max_size=12))
def test_any_bytes_have_places_that_cover_the_text(ids):
    text, found = BYTES.decode(ids), texts_of(BYTES, ids)
    assert found is not None and all(found)
    assert all(len(part) == 1 for part in found) and set(found) == set(text)


def test_spaces_that_decoding_alone_loses_are_counted():
    tokenizer = sentencepiece_like()
    assert texts_of(tokenizer, [1, 2, 3]) == ["the", " cat", "s"]  # the text's own first space was stripped
    assert texts_of(tokenizer, [2, 4, 5 + 0xC3, 5 + 0xA9, 1]) == ["cat", " ", "é", "é", " the"]


def test_tokens_that_are_not_those_of_the_text_have_no_place():
    rows = vocabulary_rows("student", BYTES)
    pieces = Pieces(*(rows[name] for name in ("id", "token", "text", "special")))
    columns = (
        [["demo"] * 3],
        [pa.array([byte_ids("ab"), byte_ids("ab"), [9999]], pa.list_(pa.int32()))],
        [["ab", "xy", ""]],
    )
    first, second, third = places_of(lambda run: pieces)(*map(pa.chunked_array, columns)).to_pylist()
    assert first == {"start": [0, 1], "length": [1, 1]} and second is None and third is None


def test_every_run_has_its_own_vocabulary():
    vocabularies = {"one": Pieces([0], ["a"], ["a"], [False]), "two": Pieces([0], ["bcd"], ["bcd"], [False])}
    ids = pa.array([[0, 0]] * 3, pa.list_(pa.int32()))
    columns = [["two", "one", "two"]], [ids], [["bcdbcd", "aa", "bcdbcd"]]
    found = places_of(vocabularies.__getitem__)(*map(pa.chunked_array, columns)).to_pylist()
    assert [place["start"] for place in found] == [[0, 3], [0, 1], [0, 3]]


@pytest.mark.parametrize(
    ("name", "shown"), [("ä¸", "<0xE4><0xB8>"), ("<0xE4>", "<0xE4>"), ("\u0142", "<0xA0>"), ("w4", "w4"), ("日", "日")]
)
def test_parts_of_characters_are_shown_as_bytes(name, shown):
    assert part_names(pa.chunked_array([[name]])).to_pylist() == [shown]
