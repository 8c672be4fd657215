"""A plugin that brings a teacher backend: it answers as a server of completions would, with a short list of its own likeliest
tokens and nothing about ids that the caller chooses. The model behind it is the local one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from opdflow.plugin import Ask, Capabilities, Host, Passage, Teacher, TeacherBackend, Values, Vocabulary, register
from tasks.engines.local import LocalModel

TOP = 8
asked: list[tuple[int, Ask]] = []
"""Passages and question of every call."""


class Served:
    """Answers from lists of at most TOP candidates: entropies too."""

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.check, self.close = model.check, model.close

    def score(
        self,
        passages: Sequence[Passage],
        ask: Ask,
        vocabulary: Vocabulary,
        given: Mapping[int, Sequence[np.ndarray]],
    ) -> Values:
        assert not given and all(k <= TOP for k in ask.top)
        asked.append((len(passages), ask))
        found = self.model.score(passages, ask | Ask(top=frozenset([TOP])), vocabulary, {})
        if ask.entropy:
            lists = zip(found[f"top{TOP}_logprobs"], found[f"top{TOP}_tail"], strict=True)
            every = (np.concatenate([top, tail[:, None]], axis=1) for top, tail in lists)
            found["entropy"] = [-(np.exp(logprobs) * logprobs).sum(axis=1) for logprobs in every]
        return {name: arrays for name, arrays in found.items() if not name.startswith("top") or _k(name) in ask.top}


def _k(name: str) -> int:
    return int(name.removeprefix("top").partition("_")[0])


@register
class ServedTeacher(TeacherBackend):
    """A server that gives its likeliest tokens and the log-probability of the sampled one."""

    kind: Literal["served"] = "served"
    quantization: str = "none"
    capabilities = Capabilities(entropy="list", top=TOP, given_ids=False, full_distribution=False)

    def rows(self, folder: Path) -> int:
        from tasks.engines.hf_folder import model_rows

        return model_rows(folder)

    def open(self, folder: Path, dtype: str, host: Host) -> Teacher:
        return Served(LocalModel(folder, dtype, host))  # type: ignore[return-value]
