"""Config of the prompts: where they come from, and how the models get them."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from storage.identity import Identity, omit_at
from tasks.inputs.addition import AdditionSource
from tasks.inputs.sources import FileSource, PromptSource
from tasks.inputs.tokenizers import TokenizerPolicy

SPLITS: tuple[Literal["eval", "train", "warmup"], ...] = ("eval", "train", "warmup")
"""In order of precedence: a prompt that is in two splits stays in the first of them."""
_TEMPLATE_ARGUMENTS = (
    "conversation",
    "messages",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
)


class PrepareConfig(Identity):
    """Which prompts there are and how they are given to the models."""

    train: PromptSource | None = Field(None, description="prompts to write rollouts for")
    eval: PromptSource | None = Field(None, description="held-out prompts; none of them is left in train or warmup")
    warmup: PromptSource | None = Field(None, description="prompts with completions for supervised fine-tuning")
    chat_template: bool = Field(
        True, description="wrap a plain `prompt` as one user message; else tokenise it as it is"
    )
    chat_template_kwargs: dict[str, str | int | float | bool | None] = Field(
        {}, description="passed to the chat template (enable_thinking: false)"
    )
    add_generation_prompt: bool = Field(True, description="end the rendering where the assistant's turn begins")
    add_special_tokens: bool = Field(True, description="plain prompts without template: BOS as the tokenizer adds it")
    date: str | None = Field(
        None,
        json_schema_extra=omit_at(None),
        description="time at which a chat template that reads the clock is rendered (2026-01-31, or 2026-01-31T12:00:00); null:"
        " the day on which the run begins, which is kept for its resumes, forks and replays",
    )
    append_eos: bool = Field(True, description="end the tokens of a `completion` with the end of sequence")
    equal_ids: Literal["refuse", "leave_out", "rename"] = Field(
        "refuse",
        description="an id that a row of another split has too: `refuse` it; `leave_out` the row of the later split (eval"
        " comes first, then train, then warmup); `rename` it to SPLIT:ID there",
        json_schema_extra=omit_at("refuse"),
    )
    max_prompt_length: int = Field(1024, ge=1, description="tokens; longer prompts are left out and counted")
    max_teacher_prompt_length: int | None = Field(None, ge=1, description="the same for what the teacher reads")
    tokenizers: TokenizerPolicy = TokenizerPolicy()

    @field_validator("chat_template_kwargs")
    @classmethod
    def _own_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in _TEMPLATE_ARGUMENTS:
            if name in value:
                raise ValueError(
                    f"chat_template_kwargs: {name!r} is set by this program, not by the template's arguments"
                )
        return value

    @field_validator("date", mode="before")
    @classmethod
    def _iso_date(cls, value: Any) -> Any:
        if isinstance(value, date):  # YAML reads an unquoted date as one
            return value.isoformat()
        if isinstance(value, str):
            try:
                datetime.fromisoformat(value)
            except ValueError as error:
                raise ValueError(f"date: {value!r} is no date; write 2026-01-31 or 2026-01-31T12:00:00") from error
        return value

    @model_validator(mode="after")
    def _some_prompts(self) -> PrepareConfig:
        if not any(getattr(self, split) for split in SPLITS):
            raise ValueError("no prompts: give train, eval or warmup a source")
        return self

    def only(self, source: FileSource | AdditionSource) -> PrepareConfig:
        """The same rendering of these prompts alone, as the split eval."""
        return self.model_copy(update={"train": None, "warmup": None, "eval": source})

    def sources(self) -> dict[str, FileSource | AdditionSource]:
        """The configured splits, in order of precedence."""
        return {split: source for split in SPLITS if (source := getattr(self, split)) is not None}
