"""Checkpoint folders: the one reader of config.json, and the one loader of weights for scorer, trainer and weight proof."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from storage.artifacts.digests import tensor_shapes
from storage.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

SAFE_LOADING: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
"""Arguments of every `from_pretrained` that reads weights: no network, no code of the checkpoint, no pickle."""
_LOGIT_CHANGES = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1}
"""Config fields that change logits after the output head, with the values at which they do nothing."""
_POSITIONS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length",
    "max_seq_length", "seq_len",
)  # fmt: skip
"""Names of the number of positions: the first covers most architectures (`attribute_map`), vLLM reads the others too."""
_RANDOM = ("drop", "jitter")
"""Parts of the names of config fields that make a forward in training mode random."""
_OTHER_HEADS = ("classif", "summary")
"""Parts of the names of dropout fields that no causal language model reads."""


def read_config(path: Path) -> PretrainedConfig:
    """config.json as transformers reads it, with the architecture's defaults. InputError when it cannot be read, or has a part
    `text_config` although its architecture has none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        empty = [name for name, value in read_json(path / "config.json").items() if value is None]
        hint = f"; these fields are null, remove them: {', '.join(sorted(empty))}" if empty else ""
        raise InputError(f"{path}: transformers cannot read its config ({error}){hint}") from error
    for name in ("text_config", "decoder", "generator"):
        if isinstance(getattr(config, name, None), dict):  # of an architecture with such a part it would be a config
            raise InputError(
                f"{path / 'config.json'}: a {config.model_type} model has no part {name}; remove the field, or correct model_type"
            )
    return config


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes the language model: of a multimodal one the text part."""
    text: PretrainedConfig = config.get_text_config(decoder=True)
    return text


def config_of(fields: dict[str, Any]) -> PretrainedConfig | None:
    """The config of an architecture given by fields, `model_type` among them. None where they are invalid, which
    `tasks.inputs.models.transformers_config` reports."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given = dict(fields)
    try:
        config: PretrainedConfig = CONFIG_MAPPING[given.pop("model_type")](**given)
    except (StrictDataclassError, ValueError, TypeError, KeyError):
        return None
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object as it stands in the file. InputError when it cannot be read or is none."""
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except FileNotFoundError as error:
        raise InputError(f"{file}: missing; a checkpoint needs it") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    return found


def declared(path: Path, name: str) -> Any:
    """A field as config.json itself states it, in the text part first; None where it does not. InputError when the file cannot be
    read."""
    config = read_json(path / "config.json")
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}.get(name)


def model_rows(path: Path) -> int:
    """Rows of a checkpoint's vocabulary. InputError when its config cannot be read or has none."""
    rows = getattr(text_config(read_config(path)), "vocab_size", None)
    if not isinstance(rows, int) or rows < 1:
        raise InputError(f"{path / 'config.json'}: vocab_size must be a positive number, found {rows!r}")
    return rows


def positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that an architecture can read, in tokens; None where it has no limit."""
    text = text_config(config)
    found = [getattr(text, name, None) for name in _POSITIONS]
    return min((value for value in found if isinstance(value, int) and value > 0), default=None)


def check_length(path: Path, longest: int) -> None:
    """Raises InputError when the model's positions do not suffice for `longest`, a prompt with its completion (tokens)."""
    limit = positions(read_config(path))
    if limit is not None and longest > limit:
        raise InputError(
            f"max_completion_length: the longest prompt with its completion has {longest} tokens, more than the {limit}"
            f" positions of {path}; lower it, or let prepare filter long prompts (prompts.max_prompt_length)"
        )


def changed_logits(config: PretrainedConfig) -> str | None:
    """The field of a config, with its value, that makes logits more than head times hidden state; None without one."""
    text = text_config(config)
    for name, neutral in _LOGIT_CHANGES.items():
        value = getattr(text, name, None)
        if value is not None and value != neutral:
            return f"{name}: {value}"
    return None


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    from transformers import PretrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def random_fields(fields: Mapping[str, Any]) -> dict[str, float]:
    """Those of a config's own fields that drop or disturb values in training, and are not 0."""
    named = {
        name: value
        for name, value in fields.items()
        if any(part in name for part in _RANDOM) and not any(part in name for part in _OTHER_HEADS)
    }
    return {n: v for n, v in named.items() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0}


def dropout_fields(config: PretrainedConfig) -> dict[str, float]:
    """The same of a config and of those nested in it."""
    return {name: value for part in _parts(config) for name, value in random_fields(vars(part)).items()}


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The same config object with every field of `dropout_fields` at 0."""
    for part in _parts(config):
        for name, value in random_fields(vars(part)).items():
            setattr(part, name, type(value)(0))
    return config


def attention(config: PretrainedConfig) -> Literal["sdpa", "eager"]:
    """transformers' implementation of attention for an architecture, the same in scorer, trainer and weight proof: sdpa where
    the architecture has it, else eager (sdpa knows no soft cap). InputError for one without a causal language model."""
    from transformers import AutoModelForCausalLM

    try:
        kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(f"transformers has no causal language model of type {config.model_type!r}") from error
    capped = getattr(text_config(config), "attn_logit_softcapping", None) is not None
    return "sdpa" if kind._supports_sdpa and not capped else "eager"


def other_architecture(config: PretrainedConfig) -> str | None:
    """The class of the causal language model of this type, where `architectures` of config.json (by which vLLM chooses) names
    another one or none; None where they agree."""
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    name: str | None = None if kind is None else kind.__name__
    return None if name in (config.architectures or ())[:1] else name


def load_causal_lm(
    path: Path, dtype: torch.dtype, *, dropout: bool = True, device_map: dict[str, int] | str | None = None
) -> PreTrainedModel:
    """The checkpoint's causal language model, on the CPU or where transformers' `device_map` puts it. With `dropout` False its
    config says 0 for every dropout.

    InputError when it cannot be loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = read_config(path)
    if not dropout:
        config = without_dropout(config)
    options = {"attn_implementation": attention(config), "device_map": device_map, "ignore_mismatched_sizes": True}
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, **options, **SAFE_LOADING
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{path}: not a causal language model that transformers can load ({error})") from error
    _require_weights(path, found[1])
    model: PreTrainedModel = found[0]
    return model


def check_weights(path: Path) -> list[str]:
    """Names of the checkpoint's tensors that its architecture does not use. Reads the headers of the files only.

    InputError as for `load_causal_lm`, which would otherwise notice after an engine has started."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shapes = tensor_shapes(path)
    config = read_config(path)
    options = {"attn_implementation": attention(config), "device_map": "meta", "ignore_mismatched_sizes": True}
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(50)  # its report repeats what is raised here
    try:
        kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        _, report = kind.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if quantized(config) and not isinstance(error, ImportError):
            return []  # its tensors have names and shapes of their own, and may need their device
        raise InputError(f"{path}: not a causal language model that transformers can load ({error})") from error
    finally:
        logging.set_verbosity(level)
    if quantized(config):
        return []
    _require_weights(path, report)
    return sorted(report["unexpected_keys"])


def quantized(config: PretrainedConfig) -> str | None:
    """How a checkpoint's weights are quantized (`quantization_config.quant_method`); None where they are not."""
    found: Any = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def _require_weights(path: Path, report: Mapping[str, Any]) -> None:
    """InputError for tensors that the files lack or have in another shape: transformers makes random ones in their place."""
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{path}: {len(missing)} tensors that config.json describes are in none of its files (the first: {missing[0]});"
            " random ones would take their place. Save the model again"
        )
    if other := sorted(report["mismatched_keys"]):
        name, stored, described = other[0]
        raise InputError(
            f"{path}: {len(other)} tensors have another shape than config.json describes (the first: {name} is {list(stored)},"
            f" described as {list(described)}); take the config.json that belongs to the weights"
        )


def read_generation(path: Path) -> dict[str, Any] | None:
    """generation_config.json; None where there is none. InputError when it is not a JSON object."""
    source = path / "generation_config.json"
    return read_json(source) if source.is_file() else None


def token_ids(value: Any, path: Path) -> list[int]:
    """`eos_token_id` of a checkpoint, a number, a list or null, as a list. InputError, naming the folder, for anything else."""
    given = value if isinstance(value, list) else [value]
    try:
        found = [int(token) for token in given if token is not None]
        if any(isinstance(token, bool) or int(token) != float(token) for token in given if token is not None):
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: eos_token_id (generation_config.json or config.json) is {value!r}, neither a token id nor a list of these"
        ) from None
    return found


def stop_token_ids(path: Path, policy: str | Sequence[int], tokenizer_eos: int | None) -> list[int]:
    """The ids that end a completion. "eos": the tokenizer's end of sequence and those of generation_config.json (where
    there is none: of config.json). Raises InputError when there is none at all."""
    if policy != "eos":
        return sorted({int(token) for token in policy})
    generation = read_generation(path)
    named = declared(path, "eos_token_id") if generation is None else generation.get("eos_token_id")
    ids = {*token_ids(named, path), *([] if tokenizer_eos is None else [tokenizer_eos])}
    if not ids:
        raise InputError(f"stop_token_ids: {path} names no end-of-sequence token; give the ids explicitly")
    return sorted(ids)


def check_stop_ids(ids: Sequence[int], rows: int, path: Path, section: str) -> None:
    """Raises InputError for stop ids past the model's rows: it cannot write these."""
    beyond = [token for token in ids if not 0 <= token < rows]
    if beyond:
        usable = [token for token in ids if token not in beyond]
        raise InputError(
            f"{section}.stop_token_ids: {path} cannot write {', '.join(map(str, beyond))} (its vocabulary has {rows} rows);"
            f" give ids that it can write" + (f", for example {section}.stop_token_ids: {usable}" if usable else "")
        )
