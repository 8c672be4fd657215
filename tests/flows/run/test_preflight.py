"""What `opd check` and a run know before an engine starts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import config, family, prompt_files, rewrite
from places import CHECKOUT
from safetensors.torch import load_file, save_file
from teacher_server import TeacherServer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flows.experiment import experiment_of, load_experiment
from flows.run import machine_checks, prompt_checks
from flows.run.check import check_experiment
from flows.run.checked import Known, Model
from storage.errors import ConfigError, InputError
from tasks.engines.hf_folder import load_causal_lm, other_architecture, read_config
from tasks.engines.teacher import backend_of
from tasks.inputs.models import parameter_count
from tasks.trainer.config import OptimizerSettings
from tasks.trainer.deepspeed_file import deepspeed_config

pytestmark = pytest.mark.usefixtures("own_workers")


def findings(folder: Path, student: Path, file: Path | None = None, **sections: Any) -> tuple[list[str], list[str]]:
    """(notes, refusals) of a student that is its own teacher."""
    experiment = experiment_of(config(student, student, file or prompt_files(folder), **sections), "test")
    lines: list[str] = []
    try:
        lines += check_experiment(experiment, folder / "store")
        refused = []
    except InputError as error:
        refused = str(error).splitlines()
    return [line for line in lines if line.startswith("note: ")], refused


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen3", {}),
        ("gpt2", {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),  # limits under the architecture's own names
        ("gpt_oss", {}),  # no sdpa
        ("gemma2", {"final_logit_softcapping": None}),
    ],
)
def test_models_that_run_are_found_fit(tmp_path, kind, fields):
    assert findings(tmp_path, family(tmp_path / kind, kind, **fields)) == ([], [])


def test_a_warm_up_of_a_checkpoint_is_named(tmp_path):
    """`base:` of a recipe brings the demo's along; a model made from an architecture needs one."""
    student = family(tmp_path / "model", "qwen3")
    train = prompt_files(tmp_path)
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(3)]
    warmup = tmp_path / "warmup.jsonl"
    warmup.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = config(student, student, train, prompts={"warmup": {"kind": "file", "path": str(warmup)}})
    data["student"]["warmup"] = {"steps": 700, "samples_per_step": 2, "lr": 1e-3}
    (line,) = [
        line for line in check_experiment(experiment_of(data, "test"), tmp_path / "store") if "student.warmup" in line
    ]
    assert "this checkpoint is trained for up to 700 steps on 3 rows" in line and "student.warmup: null" in line


@pytest.mark.parametrize("text_config", [None, {"model_type": "qwen3"}])
def test_a_text_config_without_fields_is_none(tmp_path, text_config):
    student = family(tmp_path / "model", "qwen3")
    rewrite(student / "config.json", text_config=text_config if text_config is None else ...)
    assert findings(tmp_path, student) == ([], [])


def test_limits_of_a_config_that_states_none_are_the_architectures(tmp_path):
    """save_pretrained leaves out what equals the default, and a text part may state nothing at all."""
    folder = tmp_path / "nested"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {"hidden_size": 64}}))
    from transformers import Gemma3TextConfig

    from tasks.engines.hf_folder import model_rows, positions, read_config

    plain = Gemma3TextConfig()
    assert (model_rows(folder), positions(read_config(folder))) == (plain.vocab_size, plain.max_position_embeddings)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("gemma2", {}, "final_logit_softcapping: 30.0"),
        ("cohere", {}, "logit_scale: 0.0625"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling: 8.0"),
    ],
)
def test_logits_that_are_more_than_a_product_are_refused(tmp_path, kind, fields, named):
    _, refused = findings(tmp_path, family(tmp_path / kind, kind, **fields))
    assert len(refused) == 2 and all(named in line and "config.json" in line for line in refused)  # both sides


def test_ids_that_are_merged_are_no_ids_of_their_own(tmp_path):
    student = family(tmp_path / "model", "qwen3")
    experiment = experiment_of(config(student, student, prompt_files(tmp_path)), "test")
    changed = experiment.objective.model_copy(update={"support_exclude_ids": (258, 257)})
    known = Known(
        experiment.model_copy(update={"objective": changed}),
        Model("student", student),
        Model("teacher", student),
        None,
        merged=(257, 258),
    )
    (found,) = prompt_checks.stop_ids(known)
    assert found.refused and found.text.startswith(
        "objective.support_exclude_ids: [258] are merged with the stop id 257"
    )


def test_head_sizes_that_vllm_on_cpu_lacks_are_refused(tmp_path):
    student = family(tmp_path / "model", "qwen3", head_dim=16)
    assert "heads of 16" in "".join(findings(tmp_path, student)[1])
    assert findings(tmp_path, student, runtime={"device": "cuda"}) == ([], [])


def test_stop_ids_past_the_rows_name_the_field(tmp_path):
    student = family(tmp_path / "model", "qwen3")
    rewrite(student / "generation_config.json", eos_token_id=[257, 9999])
    _, refused = findings(tmp_path, student)
    assert [line.split(":")[0] for line in refused] == ["rollout.stop_token_ids", "evaluate.stop_token_ids"]
    assert all("9999" in line and "[257]" in line for line in refused)
    given = {"stop_token_ids": [257]}
    assert findings(tmp_path, student, rollout=given, evaluate=given) == ([], [])


def test_a_prompt_that_needs_an_id_past_the_rows_is_refused(tmp_path):
    """The tokenizer has 261 ids; the last, <|assistant|>, ends every prompt. One that no text needs is a note of the audit."""
    student = family(tmp_path / "model", "qwen3", vocab_size=260)
    _, refused = findings(tmp_path, student)
    assert len(refused) == 2 and all("token id 260" in line and "260 rows" in line for line in refused)
    _, plain = findings(tmp_path, student, prompts={"chat_template": False})
    assert plain == []


def test_prompts_that_do_not_fit_the_positions_are_refused(tmp_path):
    student = family(tmp_path / "model", "qwen3")
    _, refused = findings(tmp_path, student, prompt_files(tmp_path, "x" * 242, "y" * 240, "z" * 239, "short"))
    # with <|user|>, <|end|> and <|assistant|>: 245, 243 and 242 tokens of prompt, 12 of completion, 256 positions; the
    # teacher does not read the last token
    assert len(refused) == 1 and refused[0].startswith("rollout.max_completion_length: 1 prompts of train")
    longer = prompt_files(tmp_path, "x" * 244, "y" * 240, "short", "shorter")
    (student_line, teacher_line) = findings(tmp_path, student, longer)[1]
    assert "of the student" in student_line and "of the teacher" in teacher_line
    assert "prompts.max_prompt_length: 244" in student_line


def test_prompts_that_no_round_draws_do_not_count(tmp_path):
    student = family(tmp_path / "model", "qwen3")
    texts = ["x" * 244, *(f"short {i}" for i in range(39))]
    prompts = prompt_files(tmp_path, *texts)
    drawn = [findings(tmp_path, student, prompts, policy={"rounds": rounds})[1] for rounds in (0, 10)]
    assert drawn[0] == [] and len(drawn[1]) == 2


@pytest.mark.parametrize(
    ("kind", "note", "refusal"),
    [
        ("qwen3", [], []),
        ("phi3", ["only down_proj, o_proj train", "gate_up_proj, o_proj, qkv_proj"], []),
        ("gpt2", [], ["no layer of", "c_attn, c_fc, c_proj"]),
    ],
)
def test_lora_says_which_layers_train(tmp_path, kind, note, refusal):
    zero = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if kind == "gpt2" else {}
    train = {"samples_per_step": 4, "lr": 1e-3, "lora": {"r": 4}}
    found = findings(tmp_path, family(tmp_path / kind, kind, **zero), train=train)
    for expected, lines in zip((note, refusal), found, strict=True):
        text = "".join(lines)
        assert bool(text) == bool(expected) and all(part in text for part in expected)


def test_dropout_is_noted_with_its_field(tmp_path):
    student = family(tmp_path / "model", "llama", attention_dropout=0.5)
    (note,), refused = findings(tmp_path, student)
    assert "attention_dropout: 0.5" in note and "train.dropout" in note and refused == []


@pytest.mark.parametrize("zero", ["{", '{"optimizer": {}}', '{"zero_optimization": {"stage": 7}}'])
def test_a_deepspeed_file_is_read_before_anything_is_sampled(tmp_path, zero):
    file = tmp_path / "zero.json"
    file.write_text(zero)
    runtime = {"device": "cpu", "trainer": {"deepspeed": str(file)}}
    _, (line,) = findings(tmp_path, family(tmp_path / "model", "qwen3"), runtime=runtime)
    assert str(file) in line


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    found = machine_checks.importlib.util.find_spec
    monkeypatch.setattr(
        machine_checks.importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name)
    )
    monkeypatch.setattr(machine_checks.shutil, "which", lambda name: None)
    student = family(tmp_path / "model", "qwen3")
    eager, compiled = (
        findings(tmp_path, student, runtime={"device": "cpu", "sampler": {"enforce_eager": value}})[1]
        for value in (True, False)
    )
    assert len(eager) == 2 and eager[0].startswith("vllm ") and eager[1].startswith("lscpu ")
    assert compiled[:2] == eager and len(compiled) == 3 and "g++" in compiled[2]


def test_everything_that_is_wrong_is_listed_at_once(tmp_path):
    student = family(tmp_path / "model", "gemma2", head_dim=16)
    rewrite(student / "generation_config.json", eos_token_id=9999)
    _, refused = findings(tmp_path, student)
    assert len(refused) == 2 + 1 + 2


def test_a_run_is_refused_before_its_first_worker_starts(tmp_path):
    from flows.run.runner import run_experiment

    student = family(tmp_path / "model", "gemma2")
    experiment = experiment_of(config(student, student, prompt_files(tmp_path)), "test")
    with pytest.raises(InputError, match="final_logit_softcapping"):
        run_experiment(experiment, name="x", root=tmp_path / "store", prefect=False)
    assert [file.name for file in (tmp_path / "store" / "runs" / "x" / "logs").iterdir()] == ["run.log"]


def _tensors(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_tensors_that_the_files_lack_are_refused_by_check_and_by_the_loader(tmp_path):
    """transformers would put random ones in their place, in the teacher too, and the run would end well."""
    student, lost = family(tmp_path / "model", "qwen3"), "model.layers.0.mlp.up_proj.weight"
    _tensors(student, lambda found: {name: tensor for name, tensor in found.items() if name != lost})
    _, refused = findings(tmp_path, student)
    assert [line.partition(":")[0] for line in refused] == ["student", "teacher"] and all(lost in r for r in refused)
    with pytest.raises(InputError, match=re.escape(lost)):
        load_causal_lm(student, torch.float32)


def test_tensors_of_another_shape_are_refused_and_unused_ones_noted(tmp_path):
    student = family(tmp_path / "model", "qwen3")
    _tensors(student, lambda found: found | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)})
    notes, refused = findings(tmp_path, student)
    assert len(notes) == 2 and "model.layers.9.mlp.up_proj.weight" in notes[0] and not refused
    rewrite(student / "config.json", intermediate_size=96)
    with pytest.raises(InputError, match="another shape"):
        load_causal_lm(student, torch.float32)
    _, refused = findings(tmp_path, student)
    assert len(refused) == 2 and "[64, 128]" in refused[0] and "[64, 96]" in refused[0]


def test_files_without_the_index_that_says_which_belong_to_the_model_are_refused(tmp_path):
    student = family(tmp_path / "model", "qwen3")
    (student / "model.safetensors").rename(student / "model-00001-of-00002.safetensors")
    _, refused = findings(tmp_path, student)
    assert "model.safetensors.index.json" in refused[0]


def test_a_second_copy_of_the_weights_is_not_read(tmp_path):
    """Mistral's folders have consolidated.safetensors beside the model's own files."""
    student = family(tmp_path / "model", "qwen3")
    count = parameter_count(student)
    shutil.copyfile(student / "model.safetensors", student / "consolidated.safetensors")
    assert parameter_count(student) == count


def test_quantized_weights_cannot_be_trained(tmp_path):
    student = family(tmp_path / "model", "qwen3")
    rewrite(student / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    _, refused = findings(tmp_path, student)
    assert any("quantization_config (fp8)" in line for line in refused)


def test_a_field_that_no_module_can_be_built_from_is_refused_without_a_traceback(tmp_path):
    student = family(tmp_path / "model", "qwen3")
    rewrite(student / "config.json", pad_token_id=9999)
    _, refused = findings(tmp_path, student)
    assert "Padding_idx" in refused[0]


@pytest.mark.parametrize(("value", "field"), [({}, "text_config"), (None, "auto_map")])
def test_a_field_that_transformers_cannot_read_is_named(tmp_path, value, field):
    student = family(tmp_path / "model", "qwen3")
    rewrite(student / "config.json", **{field: value})
    _, refused = findings(tmp_path, student)
    assert field in refused[0]


def test_stop_ids_of_a_checkpoint_are_numbers_or_null(tmp_path):
    student = family(tmp_path / "model", "qwen3")
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, None]}))
    assert findings(tmp_path, student) == ([], [])
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, "end"]}))
    _, refused = findings(tmp_path, student)
    assert "eos_token_id" in refused[0] and "'end'" in refused[0]


@pytest.mark.parametrize(
    ("named", "other"), [(["Qwen3ForCausalLM"], None), (None, "Qwen3ForCausalLM"), (["LlamaModel"], "Qwen3ForCausalLM")]
)
def test_the_engine_gets_the_class_that_scorer_and_trainer_load(tmp_path, named, other):
    student = family(tmp_path / "model", "qwen3")
    rewrite(student / "config.json", architectures=named)
    assert other_architecture(read_config(student)) == other


def _other_family(place: Path, kind: str, **fields: Any) -> Path:
    """A student of an architecture that docs/models.md does not have, with the tokenizer of one that it has."""
    student = family(place, "qwen3")
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=264, **fields), dtype=torch.float32)
    model.save_pretrained(student)
    return student


def test_an_architecture_that_vllm_had_once_is_refused(tmp_path):
    fields = {"d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 256}
    _, refused = findings(tmp_path, _other_family(tmp_path / "model", "mpt", **fields))
    assert any("vLLM has no MptForCausalLM" in line for line in refused)


def test_a_recurrent_state_is_refused_on_cpu(tmp_path):
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "bos_token_id": None, "eos_token_id": 257}
    _, refused = findings(tmp_path, _other_family(tmp_path / "model", "mamba", **fields))
    assert len(refused) == 1 and "recurrent state" in refused[0]


@pytest.mark.parametrize(
    "text",
    [
        '{"zero_optimization": {"stage": 0}, "zero_optimization": {"stage": 1}}',
        '{"zero_optimization": {"stage": 0, "stage": 1}}',
    ],
)
def test_a_key_that_occurs_twice_in_a_deepspeed_file_is_refused(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"ds\.json.*key '(zero_optimization|stage)' occurs twice"):
        deepspeed_config(str(tmp_path / "ds.json"), OptimizerSettings(lr=1e-4), 1)
    (tmp_path / "ds.json").write_text("[]")
    with pytest.raises(ConfigError, match="not an object"):
        deepspeed_config(str(tmp_path / "ds.json"), OptimizerSettings(lr=1e-4), 1)


def test_a_full_support_of_two_folders_needs_no_k(tmp_path):
    """The smaller vocabulary of the two; a folder that cannot be read leaves it open, and the error says where to look."""
    student, teacher = family(tmp_path / "s", "qwen3"), family(tmp_path / "t", "qwen3", vocab_size=272)
    fields = config(student, teacher, prompt_files(tmp_path))
    fields["objective"] = {"estimator": "direct", "divergence": {"kind": "reverse_kl"}, "support": {"kind": "full"}}
    assert experiment_of(fields, "test").objective.support.k == 264
    (teacher / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"support\.k: required, but missing; the smaller vocab_size"):
        experiment_of(fields, "test")


# --- the teacher's backend -------------------------------------------------------------------------------------------


def served(server: TeacherServer, **fields: Any) -> dict[str, Any]:
    return {
        "supervise": {"teacher": {"kind": "server", "model": "teacher", **fields}},
        "runtime": {"device": "cpu", "scorer": {"server": {"urls": [server.url]}}},
    }


def checked(folder: Path, student: Path, teacher: Any, **sections: Any) -> tuple[list[str], str]:
    """(notes, refusal)."""
    data = config(student, student, prompt_files(folder))
    data["teacher"] = {"source": teacher}
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    lines: list[str] = []
    try:
        lines += check_experiment(experiment_of(data, "test"), folder / "store")
    except (ConfigError, InputError) as error:
        return lines, str(error)
    return [line for line in lines if line.startswith("note: ")], ""


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return family(tmp_path / "student", "qwen3", 0), family(tmp_path / "teacher", "qwen3", 1)


def test_the_teachers_server_is_asked_what_it_can_give(tmp_path, pair):
    student, teacher = pair
    source = {"kind": "checkpoint", "path": str(teacher)}
    server = TeacherServer(teacher, longest=30)
    try:
        notes, refused = checked(tmp_path, student, source, **served(server))
        assert not refused
        assert f"teacher: {server.url} serves 'teacher': sequences of up to 256 tokens" in notes[0]
        assert "the 30 likeliest tokens" in notes[0] and "not: log-probabilities of given ids" in notes[0]
        _, refused = checked(tmp_path, student, source, **served(server, entropy_k=31))
        assert "gives 30 candidates, but the signal 'sampled' needs 31 (supervise.teacher.entropy_k)" in refused
        assert "--max-logprobs 31" in refused
        wide = {"estimator": "direct", "support": {"kind": "teacher_topk", "k": 40}}
        _, refused = checked(tmp_path, student, source, **served(server), objective=wide)
        assert "the signal 'teacher_topk' needs 40 (the objective)" in refused
        _, refused = checked(tmp_path, student, source, **served(server, model="other"))
        assert "serve 'teacher', not 'other'" in refused
        server.length = 20
        _, refused = checked(tmp_path, student, source, **served(server))
        assert "reads 20 tokens, but the longest prompt with a whole completion" in refused
    finally:
        server.kill()
    _, refused = checked(tmp_path, student, source, **served(server))
    assert "no answer from the teacher's server" in refused and "runtime.scorer.server.urls" in refused


def test_a_teacher_without_weights_needs_a_server_and_no_exact_kl(tmp_path, pair):
    student, teacher = pair
    source = {"kind": "served", "path": str(teacher), "revision": "1"}
    server = TeacherServer(teacher)
    try:
        no_kl = {"evaluate": {"max_completion_length": 12, "kl_prompts": 0}}
        _, refused = checked(tmp_path, student, source, **served(server), **no_kl)
        assert "has weights, so {kind: checkpoint" in refused
        for file in teacher.glob("*.safetensors"):
            file.unlink()
        assert checked(tmp_path, student, source, **served(server), **no_kl)[1] == ""
        assert "set evaluate.kl_prompts: 0" in checked(tmp_path, student, source, **served(server))[1]
        assert (
            "kind served has no weights, which supervise.teacher: local reads"
            in checked(tmp_path, student, source, **no_kl)[1]
        )
    finally:
        server.kill()


@pytest.mark.parametrize("support", ["student_topk", "union"])
@pytest.mark.parametrize("backend", [{"kind": "server", "model": "teacher"}, {"kind": "vllm"}])
def test_objectives_that_lists_cannot_serve_are_refused_at_load(tmp_path, backend, support):
    data = config(tmp_path, tmp_path, tmp_path / "prompts.jsonl", objective={"support": {"kind": support, "k": 4}})
    experiment_of(data, "test")
    data["supervise"] = {"teacher": backend}
    with pytest.raises(
        ConfigError, match=rf"supervise\.teacher: kind {backend['kind']} cannot give .* which the signal"
    ):
        experiment_of(data, "test")


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ({"urls": ["10.0.0.5:8000"]}, "is no address of a server"),
        ({"urls": ["http://user:pw@10.0.0.5:8000"]}, "user and password in a URL"),
        ({"urls": ["http://h:1?api_key=abcdefgh"]}, "secret"),
        ({"api_key": "abc"}, "unknown field"),
        ({"retries": -1}, "greater than or equal to 0"),
    ],
)
def test_addresses_that_are_none_and_keys_in_a_config_are_refused(tmp_path, server, why):
    data = config(tmp_path, tmp_path, tmp_path / "prompts.jsonl", runtime={"scorer": {"server": server}})
    with pytest.raises(ConfigError, match=why):
        experiment_of(data, "test")


def test_eight_bits_need_their_library(tmp_path, pair):
    student, teacher = pair
    source = {"kind": "checkpoint", "path": str(teacher)}
    _, refused = checked(tmp_path, student, source, supervise={"teacher": {"kind": "local", "quantization": "int8"}})
    assert "supervise.teacher.quantization: int8 needs the package bitsandbytes" in refused


def test_a_teacher_in_vllm_is_checked_as_the_student_is(tmp_path):
    student, teacher = family(tmp_path / "student", "qwen3"), family(tmp_path / "teacher", "qwen3", head_dim=48)
    source = {"kind": "checkpoint", "path": str(teacher)}
    assert "teacher: heads of 48" in checked(tmp_path, student, source, supervise={"teacher": {"kind": "vllm"}})[1]
    assert checked(tmp_path, student, source)[1] == ""


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([80.0], None),
        ([2.5, 80.0], "set it to 0.46 or less"),  # the smallest GPU counts
        ([1.2], "take smaller models or a larger GPU"),
        ([], None),  # not known
    ],
)
def test_models_beside_the_engine_must_fit_what_it_leaves(tmp_path, monkeypatch, sizes, found):
    """`sizes`: of the GPUs, in weights of both models."""
    student = family(tmp_path / "model", "qwen3")
    rollout = {"behaviour": "trb", "top_p": 1.0, "max_completion_length": 8}
    experiment = experiment_of(config(student, student, prompt_files(tmp_path), rollout=rollout), "test")
    experiment.runtime.device, experiment.runtime.sampler.gpu_memory_utilization = "cuda", 0.5
    weights = 2 * 4 * parameter_count(student)
    monkeypatch.setattr(machine_checks, "gpu_memory", lambda: [int(size * weights) for size in sizes])
    model = Model("student", student)
    known = Known(experiment, model, (model,), None)
    texts = [finding.text for finding in machine_checks.beside_sampler(known) if finding.refused]
    assert len(texts) == (found is not None)
    if found:
        assert found in texts[0] and "runtime.sampler.gpu_memory_utilization 0.5" in texts[0]
    experiment.runtime.device = "cpu"
    assert not list(machine_checks.beside_sampler(known))


def test_an_entropy_of_a_list_is_noted_where_the_loss_reads_it() -> None:
    """The paper's H_q is over the vocabulary; a served teacher gives that of its list."""

    def noted(recipe: str, backend: str) -> list[str]:
        e = load_experiment(CHECKOUT / f"configs/recipes/{recipe}.yaml")
        other = e.supervise.model_copy(update={"teacher": backend_of({"kind": backend, **MODEL.get(backend, {})})})
        known = SimpleNamespace(experiment=e.model_copy(update={"supervise": other}))
        return [found.text for found in prompt_checks.entropies(known)]  # type: ignore[arg-type]

    for recipe in ("antisd", "srpo", "dasd", "eopd"):
        (text,) = noted(recipe, "server")
        assert "its 20 likeliest tokens" in text and "entropy_k" in text
        assert noted(recipe, "vllm") and not noted(recipe, "local")
    assert not noted("rlsd", "server") and not noted("opd", "server")


MODEL = {"server": {"model": "teacher"}}
