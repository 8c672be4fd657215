"""What training does to the files of a checkpoint, and to its dropout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import family, rewrite

from storage.errors import InputError
from tasks.engines.hf_folder import dropout_fields, read_config
from tasks.inputs.models import ArchitectureModel, CheckpointModel, HubModel, dropout_identity
from tasks.trainer.export import export_student, rehearse_export
from tasks.trainer.model import load_model

GREEDY = '{"do_sample": false,\n "temperature": 0.6, "top_p": 0.9, "eos_token_id": [257, 256], "pad_token_id": 256}'
"""A generation config that transformers reads and refuses to write; it stands so in many older chat models."""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("models") / "student", "llama", attention_dropout=0.5)


def exported(student: Path, target: Path) -> Path:
    rehearse_export(load_model(student, "float32", dropout=False), student)
    target.mkdir()
    masters = [(name, tensor + 1) for name, tensor in load_model(student, "float32").named_parameters()]
    export_student(target, student, student, masters, "float32", None)
    return target


@pytest.mark.parametrize("content", [GREEDY, '{"eos_token_id": 257, "cache_implementation": "hybrid", "own": [1]}'])
def test_a_generation_config_is_exported_as_it_was(student, tmp_path, content):
    (student / "generation_config.json").write_text(content)
    target = exported(student, tmp_path / "target")
    assert (target / "generation_config.json").read_text() == content
    before, after = (dict(load_model(folder, "float32").named_parameters()) for folder in (student, target))
    assert all(torch.equal(after[name], tensor + 1) for name, tensor in before.items())


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.6, "do_sample": False}])
def test_without_a_generation_config_the_ends_of_config_json_stay(tmp_path, fields):
    student = family(tmp_path / "student", "llama")
    (student / "generation_config.json").unlink()
    rewrite(student / "config.json", **fields)
    target = exported(student, tmp_path / "target")
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 257


def test_what_the_export_lacks_is_found_before_a_step(student, tmp_path):
    model = load_model(student, "float32")
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((student / name).read_bytes())
    with pytest.raises(InputError, match="no tokenizer files"):
        rehearse_export(model, tmp_path)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
        ("mixtral", {"router_jitter_noise": 0.3}),
        ("phi", {"resid_pdrop": 0.3, "attention_dropout": 0.3}),
        ("gpt_neox", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    ],
)
def test_dropout_is_off_in_training_unless_asked_for(tmp_path, kind, fields):
    folder = family(tmp_path / kind, kind, **fields)
    ids = torch.arange(24)[None]

    def logits(dropout: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = load_model(folder, "float32", dropout)
        assert model.training
        return model(input_ids=ids, use_cache=False).logits

    plain = load_model(folder, "float32").eval()(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits(False), plain)
    assert (logits(True) - plain).abs().max() > 1e-3


def test_the_exported_config_keeps_its_dropout(student, tmp_path):
    target = exported(student, tmp_path / "target")
    assert dropout_fields(read_config(target)) == {"attention_dropout": 0.5}


def test_only_trainings_whose_result_changed_have_another_identity(student, tmp_path):
    """An earlier version trained with dropout: without any, and with the field on, the result is what it was."""
    plain = CheckpointModel(
        path=family(tmp_path / "plain", "gpt_neox")
    )  # classifier_dropout is 0.1 in every gpt_neox config
    fields = {"model_type": "gpt2", "n_layer": 1}  # its class has dropout that the fields do not state
    cases = [
        (CheckpointModel(path=student), False, {"dropout": "off"}),
        (CheckpointModel(path=student), True, {}),
        (plain, False, {}),
        (ArchitectureModel(config=fields), False, {"dropout": "off"}),
        (ArchitectureModel(config=fields | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}), False, {}),
        (HubModel(repo="no/such", revision="0" * 40), False, {}),
        (None, False, {}),
    ]
    assert [dropout_identity(source, on) for source, on, _ in cases] == [expected for *_, expected in cases]
