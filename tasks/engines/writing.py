"""A completion under way: the generator of its behaviour, with everything checked that it asks for and returns.

A behaviour may be a plugin's. Its faults are those of its code, not of the engine: they name its file, and trying again does
not help."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow.types import is_list

from storage.errors import OpdError
from storage.schemas import schema_for
from tasks.behaviours import Answer, Ask, Behaviour, Completion, Draw, Score, Start
from tasks.workers.jobs import Request


class BehaviourFailed(OpdError):
    """A behaviour raised an exception, or gave something that cannot be used."""


class Writing:
    """Writes one completion, turn by turn. `name`: the sample, for errors. `vocabulary`: the student's token ids; `longest`: the
    tokens for which the engine has room."""

    def __init__(self, behaviour: Behaviour, start: Start, name: str, vocabulary: int, longest: int) -> None:
        self.behaviour, self.start, self.name = behaviour, start, name
        self.vocabulary, self.longest = vocabulary, longest
        self._generator = behaviour.write(start)

    def turn(self, answer: Answer | None = None) -> Ask | Completion:
        """What is to be drawn or scored next, or the completion. `answer`: what the last one gave, None at the first turn.

        Raises BehaviourFailed, and OpdErrors of the behaviour as they are."""
        try:
            given = self._generator.send(answer) if answer is not None else next(self._generator)
        except StopIteration as end:
            return self._completion(end.value)
        except OpdError:
            raise
        except Exception as error:
            raise self._failed(f"{type(error).__name__}: {error}", error) from error
        if isinstance(given, Score):
            return self._score(given)
        if not isinstance(given, Draw):
            raise self._failed(f"it must yield a Draw or a Score, found {type(given).__name__}")
        if given.stops:
            self._check_ids("Draw.stops", given.stops)
        self._check_ids("Draw.tokens", given.tokens)
        if not isinstance(given.max_tokens, int) or given.max_tokens < 1:
            raise self._failed(f"Draw.max_tokens is {given.max_tokens!r}; ask for at least one token")
        if (length := len(given.tokens) + given.max_tokens) > self.longest:
            raise self._failed(
                f"a Draw of {len(given.tokens)} tokens and at most {given.max_tokens} new ones has {length}; the engine has"
                f" room for {self.longest} (longest prompt and rollout.max_completion_length)"
            )
        return given

    def _score(self, given: Score) -> Score:
        if "teacher" not in self.behaviour.reads:
            raise self._failed("it yields a Score, but does not say that it reads the teacher (Behaviour.reads)")
        if given.tokens:
            self._check_ids("Score.tokens", given.tokens)
        length = len(given.tokens)
        if not isinstance(given.after, int) or not 0 <= given.after <= length:
            raise self._failed(f"Score.after is {given.after!r}, of {length} tokens")
        if length >= self.start.max_tokens:
            raise self._failed(
                f"a Score of what follows {length} tokens; a completion has at most {self.start.max_tokens} tokens"
            )
        return given

    def _completion(self, made: object) -> Completion:
        if not isinstance(made, Completion):
            raise self._failed(f"it must return a Completion, found {type(made).__name__}")
        self._check_ids("Completion.token_ids", made.token_ids)
        length = len(made.token_ids)
        if length > self.start.max_tokens:
            raise self._failed(f"a Completion of {length} tokens; at most {self.start.max_tokens} were asked for")
        if len(made.logprobs) != length or not all(map(math.isfinite, made.logprobs)):
            raise self._failed(f"Completion.logprobs must be {length} finite numbers, one per token")
        if made.finish_reason not in ("stop", "length"):
            raise self._failed(f"Completion.finish_reason is {made.finish_reason!r}; it must be stop or length")
        if not 0 <= made.prefix_length <= length:
            raise self._failed(f"Completion.prefix_length is {made.prefix_length}, of {length} tokens")
        self._check_values(made)
        return made

    def _check_values(self, made: Completion) -> None:
        """The cells of the behaviour's own table: its columns, and in lists one value per token."""
        table = self.behaviour.table
        columns = {column.name: column for column in table.columns if column.name != "sample_id"} if table else {}
        if made.values.keys() != columns.keys():
            raise self._failed(
                f"Completion.values has {', '.join(made.values) or 'nothing'}; its table has {', '.join(columns) or 'none'}"
            )
        for name, value in made.values.items():
            if value is None:
                if not columns[name].nullable:
                    raise self._failed(f"Completion.values[{name!r}] is None, but its column is not nullable")
            elif is_list(columns[name].type):
                if len(value) != len(made.token_ids) or not all(map(math.isfinite, value)):
                    raise self._failed(f"Completion.values[{name!r}] must be {len(made.token_ids)} finite numbers")
            elif isinstance(value, int | float) and not math.isfinite(value):
                raise self._failed(f"Completion.values[{name!r}] is {value}, no finite number")

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        wrong = [token for token in ids if not isinstance(token, int) or not 0 <= token < self.vocabulary]
        if wrong or not ids:
            found = f"has {wrong[0]!r}" if wrong else "is empty"
            raise self._failed(f"{what} {found}; it must hold one or more ids below {self.vocabulary}")

    def _failed(self, problem: str, error: Exception | None = None) -> BehaviourFailed:
        file = str(getattr(sys.modules.get(type(self.behaviour).__module__), "__file__", "its module"))
        frames = traceback.extract_tb(error.__traceback__) if error is not None else []
        line = next((f", line {frame.lineno}" for frame in reversed(frames) if frame.filename == file), "")
        return BehaviourFailed(
            f"rollout.behaviour: {self.behaviour.kind!r} ({file}{line}) failed at sample {self.name}: {problem}"
        )


def rollout_rows(
    requests: Sequence[Request],
    prompts: Mapping[str, list[int]],
    completions: Sequence[Completion],
    behaviour: Behaviour,
    text: Callable[[Completion], str],
) -> pa.Table:
    """Rows of the table `rollouts`, one per request. `prompts`: prompt_id -> token ids; `text` gives what a
    completion reads as."""
    rows = [
        {
            "sample_id": request.sample_id,
            "prompt_id": request.prompt_id,
            "sample_index": request.sample_index,
            "prompt_token_ids": prompts[request.prompt_id],
            "completion_token_ids": made.token_ids,
            "sampling_logprobs": made.logprobs,
            "behaviour": made.label or behaviour.label,
            "prefix_length": made.prefix_length,
            "finish_reason": made.finish_reason,
            "seed": request.seed,
            "completion_text": text(made),
            "reward": None,
        }
        for request, made in zip(requests, completions, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=schema_for("rollouts"))


def text_of(tokenizer: Any, token_ids: list[int]) -> str:
    """The text of a completion, special tokens left out."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
