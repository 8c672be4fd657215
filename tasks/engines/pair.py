"""Student and teacher beside the sampler: the distributions of both at prefixes of completions under way.

Both are transformers' models with the job's weights. Each keeps the keys and values (KV) of what it has read of every open
completion, and cuts them where the completion goes on differently (a drafted token was rejected), so that only new tokens are
read. A forward takes many completions: their KVs are padded to one length, and the padding is masked. A probe at loading finds
models for which that does not give what reading the whole sequence gives (sliding windows, recurrent layers): these read every
sequence whole."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from storage.artifacts.digests import weights_digest
from storage.errors import InputError
from tasks.behaviours import Behaviour, Score, Scored, Stops
from tasks.engines import distributions
from tasks.engines.forward import LoadedModel
from tasks.engines.hf_folder import stop_token_ids
from tasks.inputs.tokenizers import load_tokenizer
from tasks.workers.jobs import ModelRef

if TYPE_CHECKING:
    from tasks.engines.sampler import OpenShard

Digest = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
Prompts = Mapping[str, Sequence[int]]
"""prompt_id -> token ids, as one of the models reads them."""
Place = tuple[int, int]
"""A completion under way: its shard, and its position there."""
_PROBE = (7, 5)
"""Lengths of the sequences of the probe."""
_PROBE_TOLERANCE = {torch.float32: 1e-4}
_PROBE_TOLERANCE_LOW_PRECISION = 5e-2
"""Relative to the largest hidden value: a model that misreads its KV is far beyond it."""


@dataclass(frozen=True)
class Reading:
    """What is asked of both models about one completion, with its prompt as each of them reads it."""

    prompt: Sequence[int]
    teacher_prompt: Sequence[int]
    score: Score


@dataclass
class _Part:
    """A sequence, and from which of its positions on hidden states are wanted."""

    place: Place
    tokens: list[int]
    first: int


@dataclass
class _Kept:
    """What a model has read of a completion: tokens, and KV of all layers (2L, heads, T, width)."""

    tokens: list[int]
    kv: Tensor


class CachedModel(LoadedModel):
    """A checkpoint that reads sequences a part at a time. `budget`: bytes of KV that it may keep; beyond, those that were not
    used for longest are read again when they are needed."""

    def __init__(self, path: Path, dtype: str, device: torch.device, budget: int) -> None:
        super().__init__(path, dtype, device)
        self._budget = budget
        self._kept: dict[Place, _Kept] = {}
        self.keeps = self._probe()

    def readable(self, tokens: list[int]) -> list[int]:
        """The tokens with 0 for ids that this model lacks."""
        return tokens if max(tokens) < self.rows else [token if token < self.rows else 0 for token in tokens]

    def clear(self) -> None:
        """Forget all sequences."""
        self._kept.clear()

    def forget(self, place: Place) -> None:
        """Forget a sequence that will not go on."""
        self._kept.pop(place, None)

    def unread(self, part: _Part) -> int:
        """How many of its tokens must be read."""
        return len(part.tokens) - self._common(part)

    def _common(self, part: _Part) -> int:
        """Leading tokens whose KV is kept; the first wanted position is always read."""
        kept = self._kept.get(part.place)
        if kept is None or not self.keeps:
            return 0
        longest = min(len(kept.tokens), part.first)
        return next((at for at in range(longest) if kept.tokens[at] != part.tokens[at]), longest)

    @torch.inference_mode()
    def states(self, parts: Sequence[_Part]) -> Tensor:
        """hidden_ND: hidden states from `first` to the end of each sequence, one after the other."""
        if not self.keeps:
            return torch.cat(
                [
                    state_TD[part.first : len(part.tokens)]
                    for part, state_TD in zip(parts, self._whole(parts), strict=True)
                ]
            )
        common = [self._common(part) for part in parts]
        news = [len(part.tokens) - keep for part, keep in zip(parts, common, strict=True)]
        past, new = max(common), max(news)
        ids_BT = torch.zeros(len(parts), new, dtype=torch.long)
        mask_BS = torch.zeros(len(parts), past + new, dtype=torch.long)
        positions_BT = torch.zeros(len(parts), new, dtype=torch.long)
        for row, (part, keep) in enumerate(zip(parts, common, strict=True)):
            ids_BT[row, : news[row]] = torch.tensor(part.tokens[keep:])
            mask_BS[row, :keep] = 1
            mask_BS[row, past : past + news[row]] = 1
            positions_BT[row] = keep + torch.arange(new).clamp(max=news[row] - 1)
        cache = self._cache(parts, common, past)
        output: Any = self._model.base_model(
            input_ids=ids_BT.to(self.device),
            attention_mask=mask_BS.to(self.device),
            position_ids=positions_BT.to(self.device),
            past_key_values=cache,
            use_cache=True,
        )
        self._keep(parts, common, news, past, output.past_key_values)
        hidden_BTD = output.last_hidden_state
        return torch.cat(
            [
                hidden_BTD[row, part.first - keep : news[row]]
                for row, (part, keep) in enumerate(zip(parts, common, strict=True))
            ]
        )

    def _cache(self, parts: Sequence[_Part], common: Sequence[int], past: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        if past:
            example = next(self._kept[part.place].kv for part, keep in zip(parts, common, strict=True) if keep)
            both_layers, heads, _, width = example.shape
            kv_LBHSD = example.new_zeros(both_layers, len(parts), heads, past, width)
            for row, (part, keep) in enumerate(zip(parts, common, strict=True)):
                if keep:
                    kv_LBHSD[:, row, :, :keep] = self._kept[part.place].kv[:, :, :keep]
            layers = both_layers // 2
            for layer in range(layers):
                cache.update(kv_LBHSD[layer], kv_LBHSD[layers + layer], layer)
        return cache

    def _keep(self, parts: Sequence[_Part], common: Sequence[int], news: Sequence[int], past: int, cache: Any) -> None:
        read = torch.stack([layer.keys[:, :, past:] for layer in cache.layers] + [
            layer.values[:, :, past:] for layer in cache.layers
        ])  # fmt: skip
        for row, (part, keep) in enumerate(zip(parts, common, strict=True)):
            added = read[:, row, :, : news[row]]
            before = self._kept.pop(part.place, None)
            whole = added.clone() if before is None or not keep else torch.cat([before.kv[:, :, :keep], added], dim=2)
            self._kept[part.place] = _Kept(list(part.tokens), whole)  # at the end: used last
        held = sum(kept.kv.nbytes for kept in self._kept.values())
        while held > self._budget and len(self._kept) > 1:
            held -= self._kept.pop(next(iter(self._kept))).kv.nbytes

    def _whole(self, parts: Sequence[_Part]) -> Iterator[Tensor]:
        longest = max(len(part.tokens) for part in parts)
        ids_BT = torch.zeros(len(parts), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, part in enumerate(parts):
            ids_BT[row, : len(part.tokens)] = torch.tensor(part.tokens)
            mask_BT[row, : len(part.tokens)] = 1
        yield from self._backbone(ids_BT.to(self.device), mask_BT.to(self.device))

    def _probe(self) -> bool:
        """Whether reading two sequences of unequal length in parts, with a token changed in between, gives what reading them
        whole gives."""
        self.keeps = False
        rows = self.rows
        whole = [_Part((-1, n), [(3 * i + 5 * n) % rows for i in range(n + 4)], 0) for n in _PROBE]
        try:
            expected = self.states(whole)
            self.keeps = True
            begun = [_Part(p.place, [*p.tokens[: p.place[1]], (p.tokens[p.place[1]] + 1) % rows], 0) for p in whole]
            self.states(begun)
            found = self.states([_Part(p.place, p.tokens, p.place[1]) for p in whole])
            edges = torch.tensor([len(p.tokens) for p in whole]).cumsum(0).tolist()
            tails = torch.cat([expected[end - 4 : end] for end in edges])
            limit = _PROBE_TOLERANCE.get(tails.dtype, _PROBE_TOLERANCE_LOW_PRECISION)
            gap = (found.float() - tails.float()).abs().max() / tails.float().abs().max().clamp(min=1e-6)
            return bool(gap <= limit)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
        ):  # whatever a model makes of such a cache
            traceback.print_exc()
            return False
        finally:
            self._kept.clear()


class Pair:
    """Student and teacher of a job, kept between jobs while their weights are the same.

    Settings (`runtime.sampler`): device, score_batch_tokens (read in a forward, padding included), score_chunk_tokens (positions
    whose V probabilities exist at once), score_cache_gib (KV of both models together)."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._device = torch.device("cpu" if settings.get("device", "cpu") == "cpu" else "cuda")
        self._batch_tokens = int(settings.get("score_batch_tokens", 8192))
        self._chunk_tokens = int(settings.get("score_chunk_tokens", 1024))
        self._budget = int(float(settings.get("score_cache_gib", 4)) * 2**30) // 2
        self._models: dict[str, tuple[tuple[str, str], CachedModel]] = {}
        self.teacher_stop_ids: list[int] = []
        """The ids that end a completion for the teacher."""

    def load(self, student: ModelRef, teacher: ModelRef, dtype: str) -> None:
        """Load both, where they are not loaded. InputError for weights that are not the job's, for a checkpoint that does not
        load, and for models whose vocabularies have nothing in common."""
        for who, ref in (("student", student), ("teacher", teacher)):
            loaded = self._models.get(who)
            if loaded is not None and loaded[0] == (ref.weights, dtype):
                continue
            self._models.pop(who, None)
            del loaded
            gc.collect()
            path = Path(ref.path)
            if (actual := weights_digest(path)) != ref.weights:
                raise InputError(f"{path}: the weights' digest is {actual[:16]}…, the job asks for {ref.weights[:16]}…")
            self._models[who] = ((ref.weights, dtype), CachedModel(path, dtype, self._device, self._budget))
        path = Path(teacher.path)
        self.teacher_stop_ids = stop_token_ids(path, "eos", load_tokenizer(path).eos_token_id)

    @property
    def rows(self) -> int:
        """Ids that the student has."""
        return self._models["student"][1].rows

    def begin(self) -> None:
        """Forget what was read: what a batch gives must not depend on an earlier one."""
        for _, model in self._models.values():
            model.clear()

    def forget(self, place: Place) -> None:
        """A completion is finished."""
        for _, model in self._models.values():
            model.forget(place)

    def rest(self) -> None:
        """Free the student, and what was read."""
        self._models.pop("student", None)
        self.begin()

    def close(self) -> None:
        """Free both models."""
        self._models.clear()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def answers(
        self, asked: Mapping[Place, Reading], digest: Digest, merged: Sequence[int] = (), excluded: Sequence[int] = ()
    ) -> Iterator[tuple[Place, Scored]]:
        """The answers in the order of `asked`. Forwards take completions in turn, at most `batch_tokens` with padding and
        `chunk_tokens` positions that are asked for. `merged`: ids of the teacher that are one, the first of them; of these
        `excluded` have no part in it."""
        models = {who: model for who, (_, model) in self._models.items()}
        rows = self.rows
        parts: dict[Place, dict[str, _Part]] = {}
        for place, reading in asked.items():
            prompts = {"student": reading.prompt, "teacher": reading.teacher_prompt}
            parts[place] = {
                who: _Part(
                    place,
                    model.readable([*prompts[who], *reading.score.tokens]),
                    len(prompts[who]) - 1 + reading.score.after,
                )
                for who, model in models.items()
            }
        for places in self._chunks(parts):
            counts = [len(asked[place].score.tokens) - asked[place].score.after + 1 for place in places]
            both = []
            for who, model in models.items():
                hidden_ND = model.states([parts[place][who] for place in places])
                logits_NV = model.head(hidden_ND)
                if who == "teacher" and excluded:
                    logits_NV[:, list(excluded)] = -math.inf
                logprobs_NV = distributions.log_probabilities(logits_NV, rows, merged if who == "teacher" else ())
                lacking = rows - logprobs_NV.shape[1]  # ids that the teacher cannot write
                both.append(
                    torch.nn.functional.pad(logprobs_NV, (0, lacking), value=-math.inf) if lacking else logprobs_NV
                )
            made = digest(*both)
            start = 0
            for place, count in zip(places, counts, strict=True):
                yield place, Scored({name: tensor[start : start + count] for name, tensor in made.items()})
                start += count

    def _chunks(self, parts: Mapping[Place, Mapping[str, _Part]]) -> Iterator[list[Place]]:
        chunk: list[Place] = []
        longest = wanted = 0
        for place, mine in parts.items():
            length = max(self._models[who][1].unread(part) for who, part in mine.items())
            count = len(mine["student"].tokens) - mine["student"].first
            longest = max(longest, length)
            over = longest * (len(chunk) + 1) > self._batch_tokens or wanted + count > self._chunk_tokens
            if chunk and over:
                yield chunk
                chunk, longest, wanted = [], length, 0
            chunk.append(place)
            wanted += count
        if chunk:
            yield chunk


class ScoreQueue:
    """The scores that completions of a batch wait for. All are answered together, once no completion waits for a draw: what is
    read in one forward then follows from the requests alone."""

    def __init__(
        self, pair: Pair, behaviour: Behaviour, prompts: Prompts, teacher_prompts: Prompts, unmapped: Sequence[int] = ()
    ) -> None:
        """`unmapped`: ids that are another token to the teacher than to the student, or that one of them lacks."""
        self._pair, self._behaviour, self._unmapped = pair, behaviour, tuple(unmapped)
        self._prompts, self._teacher_prompts = prompts, teacher_prompts
        self._waiting: dict[Place, tuple[OpenShard, Score]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def teacher_stop_ids(self) -> list[int]:
        """The ids that end a completion for the teacher, and that the student has as the same token."""
        return [
            token for token in self._pair.teacher_stop_ids if token < self._pair.rows and token not in self._unmapped
        ]

    def begin(self) -> None:
        """Start a batch: what it gives must not depend on an earlier one."""
        self._waiting.clear()
        self._pair.begin()

    def add(self, shard: OpenShard, position: int, score: Score) -> None:
        """A completion asks."""
        self._waiting[shard.item.shard, position] = (shard, score)

    def end(self, shard: OpenShard, position: int) -> None:
        """A completion is finished."""
        self._pair.forget((shard.item.shard, position))

    def answers(self) -> Iterator[tuple[OpenShard, int, Scored]]:
        """Answers to all that were waiting. Completions may ask again meanwhile; these wait for the next call."""
        waiting, self._waiting = self._waiting, {}
        groups: dict[tuple[int, ...], dict[Place, Reading]] = {}
        for place, (shard, score) in waiting.items():
            name = shard.item.requests[place[1]].prompt_id
            reading = Reading(self._prompts[name], self._teacher_prompts[name], score)
            groups.setdefault(tuple(shard.stop_ids), {})[place] = reading
        for stop_ids, asked in groups.items():
            stops, merged = self._stops(stop_ids)
            digest = partial(self._behaviour.digest, stops=stops)
            # an ordinary token of the teacher's that only stands for its ends, which are past the student's rows
            excluded = [
                token for token in merged[:1] if token in self._unmapped and token not in self._pair.teacher_stop_ids
            ]
            for place, scored in self._pair.answers(asked, digest, merged, excluded):
                yield waiting[place][0], place[1], scored

    def _stops(self, stop_ids: tuple[int, ...]) -> tuple[Stops, list[int]]:
        """What a digest is told, and the ids of the teacher that are merged before it: stop ids past the student's rows count
        as one that the student has."""
        ends, rows = self._pair.teacher_stop_ids, self._pair.rows
        near, beyond = [token for token in ends if token < rows], [token for token in ends if token >= rows]
        if beyond and not near:
            near = [stop_ids[0]]
        return Stops(stop_ids, tuple(near), self._unmapped), [near[0], *beyond] if beyond else []
