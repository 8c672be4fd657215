"""A student's and a teacher's tokenizer that differ in every way that masking knows, and conversations to try them on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from small_models import ARCHITECTURE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks.inputs.models import ArchitectureModel, initialise

_PAIRS = """
th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro
ic ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr no ct us ac ot il tr ly nc et ut ss so
rs un lo wa ge ie wh ee wi em ad ol rt po we na ul ni ts mo ow pa im mi ai sh ir su id os iv ia am fi ci vi pl
ig tu ev ld ry mp fe bl ab gh ty op wo sa ay ex ke fr oo av ag if ap gr od bo sp rd do uc bu ei ov by rm ep tt
oc fa ef cu rn sc gi da yo cr cl du ga
"""
PAIRS = _PAIRS.split()
NAMED = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
STUDENT_ADDED = (*NAMED, "<think>", "</think>", "<|extra_0|>", "<|extra_1|>", "<|extra_2|>", "<|extra_3|>")
TEACHER_ADDED = (*NAMED, "</think>", "<think>", "<|tool|>", "<|extra_1|>")
"""Remapped (think), renamed (extra_0) and missing (extra_2, extra_3) ids; extra_1 is its end of sequence."""
STUDENT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEACHER_TEMPLATE = (
    "{% for m in messages %}[{{ m['role']|upper }}]\n{{ m['content'] }}<|extra_1|>\n{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]\n{% endif %}"
)
STUDENT_ROWS, TEACHER_ROWS = 440, 432
"""The student's padding rows go past the teacher's last row."""
SNIPPETS = (
    "the ", "then here ", "antenna ", "3.14 ", "4821+1357=", "Größe ", "東京タワー ", "Привет ", "🙂🧪 ", "مرحبا ", "\n\n",
    "\t", "  ", "<|end|>", "<think>", "</think>", "<|extra_2|>", "<|tool|>", "<|user|>", "[INST]", "<|end", "|>", "é\u0301",
    "\u200b", "{{ x }}", "def f(a):\n    return a\n", "\\boxed{1}", "ﬁ", "\u00a0", "ZZZ", "\x07",
)  # fmt: skip


def tokenizer(teacher: bool) -> PreTrainedTokenizerFast:
    """Bytes and pairs of them, then the added tokens. The teacher has two pairs under each other's ids."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*symbols, *PAIRS]
    if teacher:
        here, there = names.index("th"), names.index("he")
        names[here], names[there] = names[there], names[here]
    backend = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)}, merges=[(pair[0], pair[1]) for pair in PAIRS]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    for name in TEACHER_ADDED if teacher else STUDENT_ADDED:
        backend.add_tokens([AddedToken(name, special="think" not in name, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|extra_1|>" if teacher else "<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = TEACHER_TEMPLATE if teacher else STUDENT_TEMPLATE
    return fast


def model(folder: Path, teacher: bool) -> Path:
    """A checkpoint with the student's or the teacher's tokenizer and its own number of rows."""
    source = folder.parent / f"{folder.name}-tokenizer"
    tokenizer(teacher).save_pretrained(source)
    folder.mkdir()
    rows = TEACHER_ROWS if teacher else STUDENT_ROWS
    config = {**ARCHITECTURE, "vocab_size": rows, "max_position_embeddings": 4096}
    initialise(ArchitectureModel(config=config, tokenizer={"kind": "folder", "path": source}), 1 + teacher, folder)
    return folder


def text(draw: random.Random, most: int = 6) -> str:
    return "".join(draw.choice(SNIPPETS) for _ in range(draw.randint(1, most)))


def conversation(number: int) -> list[dict[str, Any]]:
    """Messages that no other number has: roles in any sensible order, contents with special tokens spelt out."""
    draw = random.Random(f"conversation {number}")
    messages = [{"role": "system", "content": text(draw)}] if draw.random() < 0.3 else []
    for _ in range(draw.choice((0, 0, 1, 2))):
        messages.append({"role": "user", "content": text(draw)})
        messages.append({"role": "assistant", "content": text(draw)})
    return [*messages, {"role": "user", "content": f"{number}: {text(draw)}"}]


def rendered(messages: list[dict[str, Any]], teacher: bool) -> str:
    """What the template makes of them, written down a second time."""
    if teacher:
        said = [f"[{m['role'].upper()}]\n{m['content']}<|extra_1|>\n" for m in messages]
        return "".join(said) + "[ASSISTANT]\n"
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages) + "<|assistant|>"
