"""Model sources: a checkpoint folder, the Hub at a pinned revision, or an architecture with new weights.

All become a `model` artifact with the tree `model`: safetensors, configs, tokenizer files and chat template. A model that is
served elsewhere has no safetensors here."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from storage.artifacts.digests import (
    file_sha256,
    files_digest,
    tensor_shapes,
    tokenizer_digest,
    weight_files,
    weights_digest,
)
from storage.artifacts.trees import external_files
from storage.errors import RELATIVE, ConfigError, InputError, did_you_mean
from storage.identity import Identity, derive_seed
from storage.store import ArtifactSpec, Builder
from tasks.engines.hf_folder import config_of, dropout_fields, model_rows, random_fields, read_config, read_json
from tasks.inputs.shipped import load_tokenizer, read_otherwise, tokenizer_to_save
from tasks.inputs.tokenizers import BYTE_IDS, build_byte_tokenizer
from tasks.stage import LOADING, Context, Work

VERSION = 1
ROW_MULTIPLE = 8
"""Vocabulary rows of a new model are a multiple of this; rows past the tokenizer's ids are padding."""
_MOVING_REVISIONS = ("main", "master", "head")
_HUB_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.tiktoken", "tekken.json",
)  # fmt: skip


class CheckpointModel(Identity):
    """A folder of the user's with safetensors, config.json and tokenizer. It is read in place."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: Path = Field(
        description="checkpoint folder; its content, not its path, enters the keys of stages that read it"
    )


class HubModel(Identity):
    """A model of the Hugging Face Hub (or its local cache) at a fixed revision."""

    kind: Literal["hub"] = "hub"
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name")
    revision: str = Field(description="commit (40 hex digits) or tag; branches are refused, because they move")

    @field_validator("revision")
    @classmethod
    def _pinned(cls, value: str) -> str:
        if not re.fullmatch(r"[\w][\w./-]*", value) or value.removeprefix("refs/heads/").lower() in _MOVING_REVISIONS:
            raise ValueError(f"{value!r} is not a fixed revision; use a commit of 40 hex digits or a tag")
        return value


class ByteTokenizer(Identity):
    """The project's byte-level tokenizer: 256 bytes and five special tokens."""

    kind: Literal["byte"] = "byte"


class FolderTokenizer(Identity):
    """The tokenizer of a folder (tokenizer.json and so on). A plain path in the config means this."""

    kind: Literal["folder"] = "folder"
    path: Path


class ArchitectureModel(Identity):
    """A transformers architecture with random weights, to be trained from scratch by a warm-up."""

    kind: Literal["architecture"] = "architecture"
    config: dict[str, Any] = Field(description="fields of the transformers config, including model_type (qwen3)")
    tokenizer: Annotated[ByteTokenizer | FolderTokenizer, Field(discriminator="kind")] = ByteTokenizer()
    init_seed: int | None = Field(None, ge=0, description="seed of the weights; null derives it from the run's seed")

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("tokenizer"), (str, Path)):
            return {**values, "tokenizer": {"kind": "folder", "path": values["tokenizer"]}}
        return values

    @field_validator("config")
    @classmethod
    def _has_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("model_type"), str):
            raise ValueError("config: model_type is missing (qwen3, llama, ...)")
        return value


class ServedModel(Identity):
    """A model whose weights are elsewhere, behind a server: config.json and tokenizer of a folder, and a name for the weights.
    For a teacher with supervise.teacher: {kind: server}."""

    kind: Literal["served"] = "served"
    path: Path = Field(description="folder with config.json, tokenizer and generation_config.json, without weights")
    revision: str = Field(
        min_length=1,
        description="names the weights that the server has (a commit, a digest); it stands for their content in keys",
    )


Source = CheckpointModel | HubModel | ArchitectureModel | ServedModel
ModelSource = Annotated[Source, Field(discriminator="kind")]


def model_work(source: Source, seed: int, *, memo: Path | None = None) -> Work:
    """Work with the output `model`. `seed` is the run's and used for new weights only.

    `memo`: folder that remembers hashes of unchanged files. A checkpoint's folder is checked and hashed here, at planning:
    InputError if weights in safetensors, config.json or the tokenizer are missing."""
    if isinstance(source, CheckpointModel):
        return _checkpoint(source, memo)
    if isinstance(source, ServedModel):
        return _served(source, memo)
    if isinstance(source, HubModel):
        spec = ArtifactSpec.of("model", VERSION, source, {})
        return _work(spec, lambda builder, context: _build_hub(source, builder, context))
    return _architecture(source, seed, memo)


def _work(spec: ArtifactSpec, build: Callable[[Builder, Context], None]) -> Work:
    def run(builders: dict[str, Builder], context: Context) -> None:
        if "model" in builders:
            build(builders["model"], context)

    return Work(stage="model", outputs={"model": spec}, build=run)


def tokenizer_folder(source: Source) -> Path | None:
    """A folder with the source's tokenizer files, before the model is made; None where there is none. Those of the Hub are
    downloaded."""
    if isinstance(source, CheckpointModel | ServedModel):
        return source.path
    if isinstance(source, ArchitectureModel):
        return source.tokenizer.path if isinstance(source.tokenizer, FolderTokenizer) else None
    wanted = [name for name in _HUB_FILES if "safetensors" not in name]
    try:
        return _snapshot(source, wanted)
    except InputError:  # reported when the model is fetched
        return None


def declared_sizes(source: Source) -> tuple[int | None, int | None]:
    """(vocabulary rows, positions) as an architecture's fields state them; None where they do not, and for folders: what their
    config.json says is checked by `flows.run.preflight`."""
    if not isinstance(source, ArchitectureModel):
        return None, None
    config = dict(source.config)
    if isinstance(source.tokenizer, ByteTokenizer):
        config.setdefault("vocab_size", -(-BYTE_IDS // ROW_MULTIPLE) * ROW_MULTIPLE)
    rows, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    return rows if isinstance(rows, int) else None, positions if isinstance(positions, int) else None


def vocabulary_rows_of(source: Source) -> int | None:
    """Rows of a model's vocabulary, before the model is made; None where they are not known: a folder that cannot be read, a
    model of the Hub that is not in the local cache."""
    if isinstance(source, ArchitectureModel):
        return declared_sizes(source)[0]
    folder = _cached(source) if isinstance(source, HubModel) else source.path
    try:
        return None if folder is None else model_rows(folder)
    except InputError:  # reported by the stage that reads it
        return None


def _cached(source: HubModel) -> Path | None:
    """The folder of a Hub model's config.json in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.repo, "config.json", revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


DROPOUT_BY_DEFAULT = {
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small",
    "camembert", "ctrl", "data2vec-text", "electra", "emu3", "ernie", "git", "gpt-sw3", "gpt2", "gpt_bigcode",
    "gpt_neox_japanese", "marian", "mbart", "megatron-bert", "mvp", "openai-gpt", "opt", "pegasus", "phimoe",
    "plbart", "prophetnet", "reformer", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "seed_oss",
    "trocr", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip
"""Types of causal language models whose config has dropout where its fields do not state it."""


def live_dropout(source: Source) -> dict[str, float]:
    """The fields by which the model's config drops values in training, and that are not 0. Empty for a Hub model that is not in
    the local cache."""
    if isinstance(source, ArchitectureModel):
        if source.config["model_type"] not in DROPOUT_BY_DEFAULT and not random_fields(source.config):
            return {}  # without importing transformers, for every plan asks
        config = config_of(source.config)
        return {} if config is None else dropout_fields(config)
    if isinstance(source, CheckpointModel | ServedModel):
        return _folder_dropout(source.path)
    folder = _cached(source)
    return {} if folder is None else _folder_dropout(folder)


def _folder_dropout(folder: Path) -> dict[str, float]:
    fields = read_json(folder / "config.json")
    if isinstance(fields.get("model_type"), str) and not _may_drop(fields):
        return {}  # without importing transformers
    return dropout_fields(read_config(folder))


def _may_drop(fields: dict[str, Any]) -> bool:
    """Whether a config.json, or one nested in it, states dropout, or is of a type that has it by default."""
    nested = [value for value in fields.values() if isinstance(value, dict)]
    return (
        fields.get("model_type") in DROPOUT_BY_DEFAULT
        or bool(random_fields(fields))
        or any(_may_drop(part) for part in nested)
    )


DROPOUT = "dropout"
"""Field of a training's identity, beside its config."""


def dropout_identity(source: Source | None, dropout: bool) -> dict[str, str]:
    """What a training's identity has because the dropout of the model's config is off. Empty where the config has none: earlier
    versions trained with dropout, so only these results differ."""
    return {DROPOUT: "off"} if source is not None and not dropout and live_dropout(source) else {}


# --- a folder of the user's ------------------------------------------------------------------------------------------


def check_checkpoint(directory: Path, weights: bool = True) -> None:
    """Raises InputError unless the folder has config.json, a loadable tokenizer and, with `weights`, safetensors."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such checkpoint folder; {RELATIVE}")
    if not (directory / "config.json").is_file():
        adapter = (directory / "adapter_config.json").is_file()
        raise InputError(
            f"{directory}: a LoRA adapter without its base model; merge it into the base and save the result"
            if adapter
            else f"{directory}: no config.json; expected a folder written by save_pretrained"
        )
    if (directory / "adapter_config.json").is_file():  # transformers would load it too, and its base from elsewhere
        raise InputError(f"{directory}: a LoRA adapter beside the model; merge it into the weights, or move it away")
    pickles = [path for ending in ("bin", "pt", "pth", "pkl", "ckpt") for path in sorted(directory.glob(f"*.{ending}"))]
    if pickles and not any(directory.glob("*.safetensors")):
        raise InputError(f"{pickles[0]}: pickled weights are not loaded; save the checkpoint as safetensors")
    _check_architecture(directory / "config.json")
    load_tokenizer(directory)
    if weights:
        weight_files(directory)


def _check_architecture(path: Path) -> None:
    """Raises InputError unless transformers implements the architecture: code of a checkpoint is never run."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = read_json(path)
    if config.get("transformers_weights") is not None:
        raise InputError(f"{path}: transformers_weights names other weights than the hashed ones; remove the field")
    if (path.parent / "model.safetensors").is_file() and (path.parent / "model.safetensors.index.json").is_file():
        raise InputError(f"{path.parent}: model.safetensors and an index of other files; keep one of them")
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise InputError(
            f"{path}: model_type {model_type!r} needs code of the checkpoint (auto_map), which is never run (there is no"
            " trust_remote_code); use a checkpoint whose architecture transformers implements"
        )
    raise InputError(f"{path}: transformers has no model_type {model_type!r}")


def _checkpoint(source: CheckpointModel, memo: Path | None) -> Work:
    directory = source.path.resolve()
    check_checkpoint(directory)
    weights_digest(directory, memo)  # refuses a folder without weights or with a truncated file
    inputs = _in_place(directory, memo)
    spec = ArtifactSpec.of("model", VERSION, {"kind": "checkpoint"}, inputs)

    def build(builder: Builder, context: Context) -> None:
        context.log(f"model: {directory} is read in place; its files are hashed")
        builder.external("model", directory)
        meta = {"source": "checkpoint", "parameters": parameter_count(directory)}
        builder.commit(meta=meta, expected={"model": inputs["files"]})

    return _work(spec, build)


def _in_place(directory: Path, memo: Path | None) -> dict[str, str]:
    """The inputs of an artifact that is a folder of the user's. It records this folder with this content, so the path enters its
    key. Stages that read the model depend on the content alone."""
    files = {path.relative_to(directory).as_posix(): file_sha256(path, memo) for path in external_files(directory)}
    return {"files": files_digest(files), "place": hashlib.sha256(os.fsencode(directory)).hexdigest()}


def _served(source: ServedModel, memo: Path | None) -> Work:
    directory = source.path.resolve()
    check_checkpoint(directory, weights=False)
    if any(directory.glob("*.safetensors")):
        raise InputError(
            f"{directory}: has weights, so {{kind: checkpoint, path: {directory}}} describes it, and their content enters keys;"
            " kind: served is for a folder without weights"
        )
    inputs = _in_place(directory, memo)
    spec = ArtifactSpec.of("model", VERSION, {"kind": "served", "revision": source.revision}, inputs)
    weights = hashlib.sha256(f"served {source.revision}".encode()).hexdigest()

    def build(builder: Builder, context: Context) -> None:
        context.log(
            f"model: {directory} is read in place; its weights are those of a server, revision {source.revision}"
        )
        builder.external("model", directory)
        builder.commit(content={"weights": weights}, meta={"source": "served"}, expected={"model": inputs["files"]})

    return _work(spec, build)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _build_hub(source: HubModel, builder: Builder, context: Context) -> None:
    context.log(f"model: fetching {source.repo} at {source.revision}")
    folder = _snapshot(source, list(_HUB_FILES))
    check_checkpoint(folder)
    builder.external("model", folder)
    # The Hub's cache names a snapshot's folder after its commit.
    builder.commit(
        meta={"source": "hub", "repo": source.repo, "commit": folder.name, "parameters": parameter_count(folder)}
    )


def _snapshot(source: HubModel, files: list[str]) -> Path:
    """The local folder of a Hub model's files. InputError if they cannot be fetched."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise InputError(
            f"{source.repo} at {source.revision}: download failed ({error}); check name, revision, network and"
            " access (hf auth login), or download it and use kind: checkpoint"
        ) from error


# --- fresh weights ---------------------------------------------------------------------------------------------------


def _architecture(source: ArchitectureModel, seed: int, memo: Path | None) -> Work:
    init_seed = derive_seed(seed, "model") if source.init_seed is None else source.init_seed
    inputs = {}
    if isinstance(source.tokenizer, FolderTokenizer):
        load_tokenizer(source.tokenizer.path)
        inputs["tokenizer"] = tokenizer_digest(source.tokenizer.path, memo)
    identity = {
        "kind": "architecture",
        "config": source.config,
        "tokenizer": source.tokenizer.kind,
        "init_seed": init_seed,
    }
    if isinstance(source.tokenizer, FolderTokenizer) and read_otherwise(source.tokenizer.path, memo):
        identity[LOADING] = "file"
    spec = ArtifactSpec.of("model", VERSION, identity, inputs)

    def build(builder: Builder, context: Context) -> None:
        context.log(f"model: new {source.config['model_type']} weights from seed {init_seed}")
        directory = builder.directory("model")
        count = initialise(source, init_seed, directory)
        builder.commit(meta={"source": "architecture", "parameters": count})

    return _work(spec, build)


def initialise(source: ArchitectureModel, init_seed: int, directory: Path) -> int:
    """Write a float32 checkpoint with random weights and its tokenizer into `directory`; returns the parameter count.

    Raises ConfigError for an unknown model_type or field, or invalid values."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    named = source.tokenizer
    tokenizer = tokenizer_to_save(named.path) if isinstance(named, FolderTokenizer) else build_byte_tokenizer()
    config = transformers_config(source.config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError, KeyError) as error:
            raise ConfigError(
                f"config: {source.config} is not a valid {source.config['model_type']} model ({error})"
            ) from error
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return int(sum(parameter.numel() for parameter in model.parameters()))


def transformers_config(fields: dict[str, Any], tokenizer: Any) -> Any:
    """The transformers config of an architecture. Vocabulary rows and eos, bos, pad ids come from the tokenizer where
    `fields` does not set them. Raises ConfigError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given = dict(fields)
    model_type = given.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING.keys(), "see the list in transformers")
        raise ConfigError(f"config.model_type: transformers has no {model_type!r}; {hint}")
    kind = CONFIG_MAPPING[model_type]
    known = set(kind().to_dict()) | set(kind.attribute_map) | {"rope_theta", "rope_scaling"}
    for name in given:
        if name not in known:
            hint = did_you_mean(name, sorted(known), "remove it")
            raise ConfigError(f"config.{name}: not a field of a {model_type} config; {hint}")
    tokens = max(tokenizer.get_vocab().values()) + 1
    given.setdefault("vocab_size", -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE)
    if isinstance(given["vocab_size"], int) and given["vocab_size"] < tokens:
        raise ConfigError(f"config.vocab_size: {given['vocab_size']} rows, but the tokenizer has {tokens} ids")
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        given.setdefault(name, getattr(tokenizer, name))
    try:
        return kind(**given)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"config: not a valid {model_type} config ({error})") from error


def parameter_count(directory: Path) -> int:
    """Number of parameters in a checkpoint's safetensors, from their headers."""
    return sum(math.prod(shape) for shape in tensor_shapes(directory).values())
