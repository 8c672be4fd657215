"""The tokenizer that a checkpoint's folder ships: its file decides, whatever class the folder or the model type names.

transformers 5 takes vocabulary and merges of `tokenizer.json` and rebuilds the rest from a class, so that spaces, digits or
accents can be lost without an error. Here the file itself is loaded, and compared with its own library on probes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from storage.artifacts.digests import file_sha256, tokenizer_digest
from storage.disk.files import temporary_name
from storage.errors import InputError
from storage.identity import digest_of

JSON, SENTENCEPIECE, TEKKEN = "tokenizer.json", "tokenizer.model", "tekken.json"
"""Files that define a tokenizer alone, in order of precedence."""
_SETTINGS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.j*", "additional_chat_templates/*",
)  # fmt: skip
"""Files that say which tokens are special, and the chat template."""
_TABLES = ("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer_config.json")
"""Files that need a class of transformers, which knows how text is split."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Types of a sentencepiece piece."""
_UNIGRAM, _BPE = 1, 2
"""Model types of a sentencepiece file."""
PROBES = (
    "Add two and two.\n  Then stop.", " leads", "trails ", "  two", "a  b   c", "\n", "\n\n\n", "a\n\n b", "\t\tx \n y",
    "line\r\nline", "0 12 345 6789 12345678", "3.14e-10 1,000 1/2", "don't I'LL we've", "under_score  'quoted' \"x\"",
    "MixedCase ALLCAPS", "def add(a, b):\n    return a+b  # sum\n\n\nclass X:\n\tpass", "<div class='a'>&nbsp;</div>",
    "https://example.org/a?b=c&d=%20", "{{ x }} {% if y %}", r"\frac{x^2}{\sqrt{y}} \boxed{42}", "Größe, naïve, façade",
    "e\u0301 a\u0308 n\u0303", "ﬁ ① ½ Ⅷ", "東京タワーに行く。", "你好，世界", "한국어", "Привет, мир", "مرحبا بالعالم", "नमस्ते",
    "ภาษาไทย", "🙂🧪👩‍👩‍👧 🇳🇴", "\u00a0no\u200bbreak\u3000wide", "\u2581x \u0120y", "<0x41> <0x0A>", "\x07\x1b[0m",
    "a" + " " * 33 + "b", "",
)  # fmt: skip
"""Texts without special tokens on which a loaded tokenizer is compared with the library of its file."""


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint folder, as a transformers tokenizer. Runs no code of the checkpoint, uses no network.

    `tokenizer.json` is read by `tokenizers`; without it `tokenizer.model` is converted and compared with sentencepiece, and
    `tekken.json` with mistral-common. Special tokens and chat template are those of the folder's other files. The result is
    shared by all callers in this process: do not change it.

    Raises InputError if there is none, if it does not load, or if it gives other tokens than the file's own library."""
    directory = Path(directory)
    if not any((directory / name).is_file() for name in (JSON, SENTENCEPIECE, TEKKEN, *_TABLES)):
        raise InputError(
            f"{directory}: a checkpoint without tokenizer (no tokenizer.json, tokenizer.model or tekken.json);"
            " save the tokenizer beside the weights"
        )
    return _load(directory, _content(directory, None))


def load_pair(student: Path, teacher: Path) -> tuple[Any, Any]:
    """Both tokenizers; one and the same where the files are equal, whatever classes the model types name."""
    first = load_tokenizer(student)
    return first, first if tokenizer_digest(student) == tokenizer_digest(teacher) else load_tokenizer(teacher)


@lru_cache(maxsize=8)
def _load(directory: Path, content: str) -> Any:
    """`content` is part of the cache's key: a folder that changes is read again."""
    try:
        if (directory / JSON).is_file():
            return _from_json(directory)
        if (directory / SENTENCEPIECE).is_file():
            return _from_sentencepiece(directory)
        if (directory / TEKKEN).is_file():
            return _from_tekken(directory)
        return _from_tables(directory)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{directory / 'tokenizer_config.json'}: auto_map names code of the checkpoint, which is never run"
                " (there is no trust_remote_code); save the tokenizer as tokenizer.json"
            ) from error
        raise InputError(
            f"{directory}: its tokenizer does not load ({error}); save it again as tokenizer.json"
        ) from error


def _from_json(directory: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = Tokenizer.from_file(str(directory / JSON))
    settings = _given(directory)
    options: dict[str, Any] = dict(_class_defaults(directory, settings, file.get_vocab()))
    if settings.get("fix_mistral_regex"):  # would replace what the file says
        options["fix_mistral_regex"] = False
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True, **options)
    file.no_truncation()
    file.no_padding()
    file.encode_special_tokens = bool(tokenizer.split_special_tokens)
    definitions = file.get_added_tokens_decoder()
    same = [str(token) for index, token in tokenizer.added_tokens_decoder.items() if definitions.get(index) == token]
    reference = _Reference(
        library="tokenizers",
        encode=lambda text: file.encode(text, add_special_tokens=False).ids,
        encode_whole=lambda text: file.encode(text).ids,
        decode=lambda ids: file.decode(ids, skip_special_tokens=False),
        vocabulary=file.get_vocab(),
        probes=(*PROBES, *_spelt_out(same)),
    )
    reference.require(tokenizer, directory / JSON)
    return tokenizer


def _from_sentencepiece(directory: Path) -> Any:
    import sentencepiece

    path = directory / SENTENCEPIECE
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{path}: not a sentencepiece model, and how it splits text is not in it (a tiktoken file, say); save the"
            " tokenizer as tokenizer.json"
        ) from error
    settings = _given(directory)
    backend, names = _converted(path, legacy=settings.get("legacy") is not False)
    tokenizer = _with_backend(
        directory, backend, {name: token for name, token in names.items() if name not in settings}
    )
    for name in ("add_bos_token", "add_eos_token"):
        if settings.get(name):
            setattr(tokenizer, name, True)
    added = {*map(str, tokenizer.added_tokens_decoder.values()), *names.values()}
    unknown = processor.unk_id()
    reference = _Reference(
        library="sentencepiece",
        encode=lambda text: processor.encode(text),
        decode=lambda ids: processor.decode(ids),
        vocabulary={processor.id_to_piece(index): index for index in range(processor.get_piece_size())},
        probes=tuple(text for text in PROBES if not any(token in text for token in added)),
        decodable=lambda ids: unknown not in ids,
        # With `legacy: false` only the text's beginning gets the dummy prefix, and only where there is no space already.
        comparable=lambda text: settings.get("legacy") is not False or not text.startswith((" ", "\u2581")),
        renamed=_renamed(settings),
    )
    reference.require(tokenizer, path)
    return tokenizer


def _from_tekken(directory: Path) -> Any:
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers.integrations.mistral.tokenizer import MistralConverter

    path = directory / TEKKEN
    tekken, settings = Tekkenizer.from_file(path), _given(directory)
    names = {"bos_token": tekken.bos_id, "eos_token": tekken.eos_id, "unk_token": tekken.unk_id}
    defaults = {name: tekken.id_to_piece(index) for name, index in names.items() if name not in settings}
    tokenizer = _with_backend(directory, MistralConverter(str(path)).converted(), defaults)
    if tokenizer.chat_template is None:
        with suppress(ValueError, KeyError, NotImplementedError):  # a version of the format without a template
            tokenizer.chat_template = convert_tokenizer_to_chat_template(str(path))
    reference = _Reference(
        library="mistral-common",
        encode=lambda text: tekken.encode(text, bos=False, eos=False),
        decode=lambda ids: tekken.decode(ids),
        probes=PROBES,
    )
    reference.require(tokenizer, path)
    return tokenizer


def _with_backend(directory: Path, backend: Any, defaults: dict[str, str]) -> Any:
    """A `tokenizers.Tokenizer` with the special tokens and the template of a folder, whose other files are not read."""
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as place:
        for name in _SETTINGS:
            for path in directory.glob(name):
                (Path(place) / path.relative_to(directory)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, Path(place) / path.relative_to(directory))
        backend.save(str(Path(place) / JSON))
        options: dict[str, Any] = dict(defaults)
        return PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True, **options)


def _from_tables(directory: Path) -> Any:
    """Vocabulary and merges in files of their own: only a class knows how text is split."""
    tokenizer = _by_class(directory)
    if type(tokenizer).__name__ == "TokenizersBackend":
        raise InputError(
            f"{directory}: its files hold a vocabulary, but neither they nor tokenizer_class (tokenizer_config.json) say how text"
            " is split; save the tokenizer as tokenizer.json"
        )
    return tokenizer


def _by_class(directory: Path) -> Any:
    """What transformers makes of a folder: a tokenizer of the class that the folder or the model type names."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)


def _class_defaults(directory: Path, settings: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, str]:
    """Special tokens that the folder does not name and its class does (`<|endoftext|>` of gpt2), where the file has them."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

    missing = [name for name in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES if name not in settings]
    general = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    if not missing or (general and _model_type(directory) not in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS):
        return {}
    try:
        named = _by_class(directory)
        tokens = {name: getattr(named, name, None) for name in missing}
    except Exception:  # the class is not needed to read the file
        return {}
    return {name: str(token) for name, token in tokens.items() if token is not None and str(token) in vocabulary}


def _given(directory: Path) -> dict[str, Any]:
    """Fields of tokenizer_config.json and special_tokens_map.json. InputError for a file that is no JSON object."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict):
            raise InputError(f"{path}: must hold a JSON object")
        found |= content
    return found


def _model_type(directory: Path) -> str | None:
    with suppress(OSError, ValueError, AttributeError):  # what is wrong with it is reported where the model is checked
        return json.loads((directory / "config.json").read_bytes()).get("model_type")
    return None


def _spelt_out(tokens: Iterable[str]) -> Iterator[str]:
    """Texts with added tokens between words, spaces and digits, and next to each other."""
    tokens = list(tokens)
    for start in range(0, len(tokens), 100):
        some = tokens[start : start + 100]
        yield "".join(f"a {token} b{token}1 " for token in some)
        yield "".join(some)
        yield "\n".join(some)


# --- comparison with the library of the file ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reference:
    """A tokenizer file as its own library reads it."""

    library: str
    encode: Callable[[str], list[int]]
    """Ids without special tokens around the text."""
    decode: Callable[[list[int]], str]
    probes: tuple[str, ...]
    encode_whole: Callable[[str], list[int]] | None = None
    """With the special tokens that the file puts around a text (BOS, EOS)."""
    vocabulary: dict[str, int] | None = None
    decodable: Callable[[list[int]], bool] = lambda ids: True
    comparable: Callable[[str], bool] = lambda text: True
    renamed: frozenset[int] = frozenset()
    """Ids that the folder gives another name (added_tokens_decoder)."""

    def require(self, tokenizer: Any, path: Path) -> None:
        """InputError where the tokenizer differs from the file."""
        difference = next(self._differences(tokenizer), None)
        if difference is not None:
            raise InputError(
                f"{path}: transformers reads it otherwise than {self.library} ({difference}), so prompts would be wrong;"
                " save the tokenizer again with the library that made it, as tokenizer.json"
            )

    def _differences(self, tokenizer: Any) -> Iterator[str]:
        loaded = tokenizer.get_vocab()
        for token, index in (self.vocabulary or {}).items():
            if loaded.get(token) != index and index not in self.renamed:
                yield f"id {index} is {token!r} in the file, and {token!r} has id {loaded.get(token)} when loaded"
        for text in filter(self.comparable, self.probes):
            ids = self.encode(text)
            if tokenizer(text, add_special_tokens=False).input_ids != ids:
                yield f"other tokens for {text[:80]!r}"
            if self.encode_whole is not None and tokenizer(text).input_ids != self.encode_whole(text):
                yield f"other tokens around {text[:80]!r}"
            if self.decodable(ids) and _decoded(tokenizer, ids) != self.decode(ids):
                yield f"another text for the tokens of {text[:80]!r}"


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _renamed(settings: dict[str, Any]) -> frozenset[int]:
    return frozenset(int(index) for index in settings.get("added_tokens_decoder") or {})


# --- sentencepiece to tokenizers ----------------------------------------------------------------------------------------


def _converted(path: Path, legacy: bool) -> tuple[Any, dict[str, str]]:
    """(`tokenizers.Tokenizer`, names of special tokens) of a sentencepiece model, with its normalisation and dummy prefix.

    `legacy`: each piece of text between special tokens gets the dummy prefix, as sentencepiece does when it is called for each;
    else only the beginning of the whole text."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    proto.ParseFromString(path.read_bytes())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise InputError(
            f"{path}: a sentencepiece model with whitespace as suffix; save the tokenizer as tokenizer.json"
        )
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    backend = Tokenizer(_model(path, proto, whole=bool(user_defined)))
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend("\u2581"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    first = "first" if rules.add_dummy_prefix and not legacy else "never"
    splits: list[Any] = [pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=first, split=False)]
    if user_defined:
        longest_first = "|".join(_escaped(piece) for piece in sorted(user_defined, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(longest_first), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    ends = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    control = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    named = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    named["pad_token"] = trainer.pad_id
    return backend, {name: proto.pieces[index].piece for name, index in named.items() if index >= 0}


def _model(path: Path, proto: Any, whole: bool) -> Any:
    """The model of the pieces. `whole`: a part of the text that is a piece is that piece (user-defined ones are split off)."""
    from tokenizers import models

    trainer = proto.trainer_spec
    if trainer.model_type == _UNIGRAM:
        # A byte is never read from a text such as "<0x41>"; unknown letters stay below bytes.
        pieces = [(piece.piece, -1e9 if piece.type == _BYTE else piece.score) for piece in proto.pieces]
        return models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != _BPE:
        raise InputError(f"{path}: a sentencepiece model of words or characters; save the tokenizer as tokenizer.json")
    merges = []
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, cut, left, right))
    merges.sort(key=lambda merge: merge[:2])
    return models.BPE(
        vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
        merges=[(left, right) for *_, left, right in merges],
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=whole,
    )


def _escaped(text: str) -> str:
    """A literal in Oniguruma's syntax."""
    return "".join(f"\\x{{{ord(letter):x}}}" if not letter.isalnum() else letter for letter in text)


# --- what transformers' classes made of it -------------------------------------------------------------------------------


def read_otherwise(directory: Path, memo: Path | None = None) -> str | None:
    """How the class that transformers picks differs from the tokenizer in use; None where both give equal results.

    Versions up to 0.1.0 used that class: what they made of such a folder must not be found again. `memo`: folder that
    remembers the answer for these files and library versions. Raises InputError like `load_tokenizer`."""
    return remembered(directory, memo, "tokenizer", lambda: _class_difference(directory) or "") or None


def tokenizer_to_save(directory: Path) -> Any:
    """The tokenizer of a folder for a new checkpoint: of the class that transformers picks, where results are equal, so that
    its files are those that earlier versions wrote."""
    return load_tokenizer(directory) if read_otherwise(directory) else _by_class(directory)


def remembered(directory: Path, memo: Path | None, kind: str, compute: Callable[[], str]) -> str:
    """A text that depends on a folder's tokenizer alone; the folder `memo` remembers it for these files and libraries."""
    if memo is None:
        return compute()
    note = memo / f"{kind}-{_content(directory, memo)[:40]}"
    with suppress(OSError, ValueError):
        known = note.read_text("utf-8")
        if known.startswith("found: "):
            return known.removeprefix("found: ")
    found = compute()
    with suppress(OSError):  # the memo is optional
        memo.mkdir(parents=True, exist_ok=True)
        temporary = memo / temporary_name()
        temporary.write_text(f"found: {found}", "utf-8")
        temporary.replace(note)
    return found


def _class_difference(directory: Path) -> str | None:
    shipped = load_tokenizer(directory)
    try:
        other = _by_class(directory)
    except Exception:  # no earlier version can have used it
        return None
    name = type(other).__name__
    try:
        difference = next(_other_results(shipped, other), None)
    except Exception as error:  # a class that cannot do what a tokenizer must
        difference = f"{type(error).__name__}: {error}"
    return None if difference is None else f"{name} gives {difference}"


def _other_results(shipped: Any, other: Any) -> Iterator[str]:
    same_backend = shipped.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    added = [str(token) for token in shipped.added_tokens_decoder.values()]
    if not same_backend:
        yield from _other_tokens(shipped, other, PROBES, special=False)
        yield from _other_tokens(shipped, other, [*PROBES, *_spelt_out(added)], special=True)
    for name in shipped.SPECIAL_TOKENS_ATTRIBUTES:
        if getattr(shipped, name) != getattr(other, name):
            yield f"the {name} {getattr(other, name)!r} instead of {getattr(shipped, name)!r}"
    if (mine := set(shipped.all_special_ids)) != (theirs := set(other.all_special_ids)):
        yield f"{len(theirs)} special tokens instead of {len(mine)}"
    if same_backend:
        return
    vocabulary = shipped.get_vocab()
    if vocabulary != other.get_vocab():
        yield f"{len(other.get_vocab())} tokens instead of {len(vocabulary)}, or others"
    yield from _other_tokens(shipped, other, _vocabulary_texts(shipped), special=False)
    alone = [[index] for index in sorted(vocabulary.values())]
    texts = [side.batch_decode(alone, clean_up_tokenization_spaces=False) for side in (shipped, other)]
    if texts[0] != texts[1]:
        yield "other texts for single tokens"


def _other_tokens(shipped: Any, other: Any, texts: Iterable[str], special: bool) -> Iterator[str]:
    texts = list(texts)
    both = (side(texts, add_special_tokens=special).input_ids for side in (shipped, other))
    for text, ours, theirs in zip(texts, *both, strict=True):
        if ours != theirs:
            yield f"other tokens for {text[:40]!r}"
        if len(text) < 100 and _decoded(shipped, ours) != _decoded(other, ours):
            yield f"another text for the tokens of {text[:40]!r}"


def _vocabulary_texts(tokenizer: Any) -> list[str]:
    """Texts that hold every token of the vocabulary once."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = [index for index in sorted(tokenizer.get_vocab().values()) if index not in special]
    chunks = [ids[start : start + 50] for start in range(0, len(ids), 50)]
    return list(tokenizer.batch_decode(chunks, clean_up_tokenization_spaces=False))


def _content(directory: Path, memo: Path | None) -> str:
    """Digest of what decides how a folder's tokenizer loads: its files, config.json and the libraries."""
    config = directory / "config.json"
    parts = [
        tokenizer_digest(directory, memo),
        file_sha256(config, memo) if config.is_file() else "",
        *(version(name) for name in ("transformers", "tokenizers")),
    ]
    return digest_of(parts)
