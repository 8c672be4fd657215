"""Model sources: what becomes an artifact, what its key depends on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from small_models import ARCHITECTURE, Bench, checkpoint

from storage.errors import ConfigError, InputError
from storage.store import Store
from tasks.inputs.models import ArchitectureModel, CheckpointModel, HubModel, ModelSource, ServedModel, model_work


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(Store(tmp_path / "store"))


def architecture(**fields) -> ArchitectureModel:
    return ArchitectureModel(config={**ARCHITECTURE, **fields})


def key(source, seed=0) -> str:
    return model_work(source, seed).outputs["model"].key


def test_architecture_becomes_a_checkpoint_that_transformers_loads(bench):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    artifact = bench.build(model_work(architecture(), 5))
    folder = bench.store.materialize(artifact)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (loaded.config.vocab_size, loaded.config.hidden_size) == (264, 32)
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == tokenizer.eos_token_id == 257
    assert artifact.meta["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".jinja"}


def test_same_seed_same_weights_other_seed_others(bench, tmp_path):
    first = bench.build(model_work(architecture(), 5))
    again = Bench(Store(tmp_path / "other")).build(model_work(architecture(), 5))
    other = bench.build(model_work(architecture(), 6))
    assert (again.key, again.content) == (first.key, first.content)
    assert other.content["weights"] != first.content["weights"]
    assert other.content["tokenizer"] == first.content["tokenizer"]


def test_init_seed_overrules_the_runs_seed():
    fixed = ArchitectureModel(config=ARCHITECTURE, init_seed=3)
    assert key(fixed, seed=1) == key(fixed, seed=2)
    assert key(architecture(), seed=1) != key(architecture(), seed=2)


def test_making_weights_leaves_the_random_state_alone(bench):
    import torch

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    bench.build(model_work(architecture(), 5))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "qwen33"}, "did you mean 'qwen3"),
        ({"hiden_size": 32}, r"config\.hiden_size: .* did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "not a valid qwen3 config"),
        ({"vocab_size": 100}, "100 rows, but the tokenizer has 261 ids"),
    ],
)
def test_bad_architectures_are_refused(bench, fields, message):
    with pytest.raises(ConfigError, match=message):
        bench.build(model_work(architecture(**fields), 0))


def test_architecture_takes_the_tokenizer_of_a_folder(bench, model):
    source = ArchitectureModel(config=ARCHITECTURE, tokenizer=str(model))
    assert "chat_template.jinja" in {
        p.name for p in bench.store.materialize(bench.build(model_work(source, 0))).iterdir()
    }


def test_checkpoint_stays_where_it_is(bench, model):
    artifact = bench.build(model_work(CheckpointModel(path=model), 0))
    assert bench.store.materialize(artifact) == model.resolve()
    assert {"weights", "tokenizer", "architecture"} <= set(artifact.content)
    assert not list((bench.store.root / "artifacts").rglob("*.safetensors"))


def test_a_checkpoint_that_changes_while_it_is_read_is_no_artifact(bench, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "own")
    work = model_work(CheckpointModel(path=folder), 0)
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(InputError, match=r"own: changed while it was read"):
        bench.build(work)
    assert bench.store.list() == []
    assert bench.build(model_work(CheckpointModel(path=folder), 0)).key != work.outputs["model"].key


def test_checkpoint_is_known_by_content_and_its_artifact_by_place(bench, model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    here, there = CheckpointModel(path=model), CheckpointModel(path=copy)
    first, second = (bench.build(model_work(source, 0)) for source in (here, there))
    assert first.content == second.content and first.key != second.key
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    third = bench.build(model_work(there, 0))
    assert third.key != second.key and third.content["weights"] == second.content["weights"]


@pytest.mark.parametrize(
    "remove, message",
    [
        ("config.json", "no config.json"),
        ("tokenizer*", "checkpoint without tokenizer"),
        ("model.safetensors", r"no \*\.safetensors"),
    ],
)
def test_incomplete_checkpoints_are_refused_at_planning(model, tmp_path, remove, message):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    for path in copy.glob(remove):
        path.unlink()
    with pytest.raises(InputError, match=message):
        model_work(CheckpointModel(path=copy), 0)


def test_pickles_and_adapters_are_refused_by_name(model, tmp_path):
    pickled = Path(shutil.copytree(model, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: pickled weights"):
        model_work(CheckpointModel(path=pickled), 0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="LoRA adapter without its base"):
        model_work(CheckpointModel(path=adapter), 0)
    with pytest.raises(InputError, match="no such checkpoint folder"):
        model_work(CheckpointModel(path=tmp_path / "nowhere"), 0)


def test_hub_models_come_from_the_cache_at_their_commit(bench, model, tmp_path, monkeypatch):
    """The Hub's cache as `snapshot_download` leaves it: blobs, and links to them under the commit."""
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--owner--small" / "snapshots" / commit
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(index))
        (snapshot / path.name).symlink_to(blobs / str(index))
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    artifact = bench.build(model_work(HubModel(repo="owner/small", revision=commit), 0))
    local = bench.build(model_work(CheckpointModel(path=model), 0))
    assert artifact.meta["commit"] == commit
    assert artifact.content == local.content
    with pytest.raises(InputError, match=r"owner/small at v9: download failed"):
        bench.build(model_work(HubModel(repo="owner/small", revision="v9"), 0))


@pytest.mark.parametrize("revision", ["main", "Master", "HEAD", "refs/heads/main", ""])
def test_moving_revisions_are_refused(revision):
    with pytest.raises(ValidationError, match="is not a fixed revision"):
        HubModel(repo="owner/small", revision=revision)


def test_revision_must_be_given():
    with pytest.raises(ValidationError, match="revision"):
        TypeAdapter(ModelSource).validate_python({"kind": "hub", "repo": "owner/small"})


def test_architecture_needs_a_type():
    with pytest.raises(ValidationError, match="model_type is missing"):
        ArchitectureModel(config={"hidden_size": 32})


# --- a model whose weights are elsewhere -----------------------------------------------------------------------------


def test_a_served_model_has_its_revision_for_weights(bench, model, tmp_path):
    folder = tmp_path / "described"
    shutil.copytree(model, folder)
    with pytest.raises(InputError, match=r"has weights, so .*kind: checkpoint"):
        model_work(ServedModel(path=folder, revision="a"), 0)
    (folder / "model.safetensors").unlink()
    first, second = (bench.build(model_work(ServedModel(path=folder, revision=name), 0)) for name in ("a", "b"))
    whole = bench.build(model_work(CheckpointModel(path=model), 0))
    assert bench.store.materialize(first) == folder.resolve()
    assert len({artifact.content["weights"] for artifact in (first, second, whole)}) == 3
    for part in ("architecture", "tokenizer", "generation"):
        assert first.content[part] == second.content[part] == whole.content[part]
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert bench.build(model_work(ServedModel(path=moved, revision="a"), 0)).content == first.content


def test_a_changed_folder_of_a_served_model_is_another_model(bench, model, tmp_path):
    folder = tmp_path / "described"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    artifact = bench.build(model_work(ServedModel(path=folder, revision="a"), 0))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert key(ServedModel(path=folder, revision="a")) != artifact.key
    with pytest.raises(InputError, match=r"config\.json"):
        bench.store.materialize(artifact)
