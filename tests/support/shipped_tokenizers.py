"""Folders with real and with odd tokenizers, and what the library of each file makes of a text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sentencepiece
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Encode = Callable[[str], list[int]]

TEXT = (
    "The quick brown fox doesn't jump over 12 lazy dogs. Don't panic: 3.14 is not 22/7, is it?\n\n  Indented text, and\ttabs.\n"
    "def add(a, b):\n    return a + b  # the sum\n\nGröße und naïve Fässer, Привет мир, 東京タワーに行く。\n"
    "ABC: He then went there and there again; the others are in the hall, or on the hill, 1000 to 1,000,000 <> 2000 - 30000.\n"
)


def packaged(package: str, name: str) -> Path:
    """A file of an installed package, without importing the package."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"pip install {package} (requirements/dev.txt)"
    return Path(spec.submodule_search_locations[0]) / name


def folder(place: Path, files: dict[str, Path], config: dict[str, Any] | None, model_type: str = "llama") -> Path:
    """A checkpoint's folder without weights: `files` under their new names, tokenizer_config.json and config.json."""
    place.mkdir(parents=True)
    for name, source in files.items():
        shutil.copyfile(source, place / name)
    if config is not None:
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    (place / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 200_000}))
    return place


@dataclass(frozen=True)
class Library:
    """A tokenizer file as its own library reads it: pieces between control tokens, each by itself."""

    control: dict[str, int]
    plain: Encode

    @cached_property
    def _between(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._between.split(text):
            ids += [self.control[part]] if part in self.control else self.plain(part) if part else []
        return ids


def of_json(place: Path) -> Library:
    """`tokenizers` splits at added tokens itself."""
    file = Tokenizer.from_file(str(place / "tokenizer.json"))
    return Library({"\0 no control token": -1}, lambda text: file.encode(text, add_special_tokens=False).ids)


def of_sentencepiece(place: Path) -> Library:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(place / "tokenizer.model"))
    ids = range(processor.get_piece_size())
    control = {processor.id_to_piece(i): i for i in ids if processor.is_control(i) or processor.is_unknown(i)}
    return Library(control, processor.encode)


def of_tekken(place: Path) -> Library:
    tekken = Tekkenizer.from_file(place / "tekken.json")
    control = {tekken.id_to_piece(i): i for i in range(tekken.num_special_tokens)}
    return Library(control, lambda text: tekken.encode(text, bos=False, eos=False))


def small_bpe(lines: Iterable[str] = (TEXT,), **parts: Any) -> Tokenizer:
    """A byte-level BPE of 400 ids that keeps three digits together and folds no accents; `parts` replace its parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[\p{L}\p{M}]+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|end|>", "<|user|>", "<|pad|>")])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


SMALL_JSON: dict[str, Callable[[], Tokenizer]] = {
    "digits": small_bpe,
    "spaces": lambda: small_bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "folded": lambda: small_bpe(normalizer=normalizers.NFKC()),
    "metaspace": lambda: _metaspace(),
}
"""Tokenizers that no class of transformers reads as their files say."""


def _metaspace() -> Tokenizer:
    names = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(33, 127)), "th", "\u2581th", "he", "in", "\u2581a"]
    merges = [("t", "h"), ("\u2581", "th"), ("h", "e"), ("i", "n"), ("\u2581", "a")]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges, unk_token="<unk>", fuse_unk=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken(x, normalized=False) for x in ("<s>", "</s>", "[I]", "[/I]")])
    return tokenizer


def train_sentencepiece(place: Path, **options: Any) -> Path:
    """A small sentencepiece model in a folder of its own."""
    place.mkdir(parents=True)
    options = {"model_type": "bpe", "vocab_size": 360, "byte_fallback": True, "hard_vocab_limit": False} | options
    options |= {"character_coverage": 1.0, "minloglevel": 2}
    with open(place / "tokenizer.model", "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.splitlines() * 20), model_writer=writer, **options
        )
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 1000}))
    return place


def small_tekken(place: Path) -> Path:
    """The first 1,500 tokens of Mistral's file, which loads in a second."""
    content = json.loads(packaged("mistral_common", "data/tekken_240911.json").read_text())
    content["config"]["default_vocab_size"] = 1000 + 1500
    content["vocab"] = content["vocab"][:1500]
    place.mkdir(parents=True)
    (place / "tekken.json").write_text(json.dumps(content))
    (place / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": 4096}))
    return place
