"""Loading runs no unverified code: payloads beside and inside of checkpoints, in configs and in data never make their canary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from canary import MODULES, PICKLES, Canary, edit, poison
from feed import Feed
from small_models import Bench, checkpoint

from flows.config_file import parse_override, read_layers
from flows.experiment import load_experiment
from storage.errors import ConfigError, CorruptArtifact, InputError, OpdError
from storage.runs import Run, _checksum
from storage.schemas import schema_for
from storage.store import ArtifactSpec, Store
from tasks.engines.forward import LoadedModel
from tasks.engines.hf_folder import model_rows
from tasks.engines.weight_proof import reference_logprobs
from tasks.inputs.models import CheckpointModel, model_work
from tasks.inputs.sources import FileSource, read_rows
from tasks.inputs.tokenizers import audit_tokenizers, load_tokenizer
from tasks.inputs.verifiers import ExactMatch, MathVerify, verify
from tasks.trainer.export import export_student
from tasks.trainer.model import load_model
from tasks.workers.jobs import ArtifactRef, ModelRef, Request, SampleJob, SampleShard, Sampling

pytestmark = pytest.mark.promise(15, "payloads in checkpoints, adapters, templates, YAML tags, prompt files")


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("clean") / "model")


@pytest.fixture
def canary(tmp_path) -> Canary:
    return Canary(tmp_path / "canary")


@pytest.fixture
def poisoned(clean, tmp_path, canary) -> Path:
    """A checkpoint that transformers knows, with every payload beside it and configs that point at them."""
    folder = Path(shutil.copytree(clean, tmp_path / "poisoned"))
    poison(folder, canary)
    return folder


def test_the_payloads_are_live(canary):
    canary.proven()


def export(folder: Path) -> None:
    target = folder.parent / "exported"
    target.mkdir()
    model = load_model(folder, "float32")
    export_student(target, folder, folder, list(model.named_parameters()), "float32", None)
    shutil.rmtree(target)


def plan_and_make(folder: Path) -> None:
    bench = Bench(Store(folder.parent / f"store-{folder.name}"))
    bench.store.materialize(bench.build(model_work(CheckpointModel(path=folder), 0)))


LOADERS: dict[str, Callable[[Path], object]] = {
    "tokenizer": load_tokenizer,
    "audit": lambda folder: audit_tokenizers(folder, folder),
    "config": model_rows,
    "scorer": lambda folder: LoadedModel(folder, "float32", torch.device("cpu")),
    "probes": lambda folder: reference_logprobs(folder, [([1, 2], [3])]),
    "trainer": lambda folder: load_model(folder, "float32"),
    "export": export,
    "plan": plan_and_make,
}
"""Everything of this program that reads a checkpoint folder, but for the engine (below)."""


@pytest.mark.parametrize("loader", LOADERS)
def test_what_lies_beside_a_checkpoint_is_never_run(loader, poisoned, canary, monkeypatch):
    monkeypatch.chdir(poisoned)
    LOADERS[loader](poisoned)
    assert canary.alive


def test_students_carry_no_payload_along(poisoned, tmp_path, canary):
    target = tmp_path / "student"
    target.mkdir()
    model = load_model(poisoned, "float32")
    export_student(target, poisoned, poisoned, list(model.named_parameters()), "float32", None)
    names = {path.name for path in target.rglob("*")}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja", ""}
    assert "auto_map" not in json.loads((target / "config.json").read_text())
    assert canary.alive


@pytest.mark.parametrize("loader", [name for name in LOADERS if name not in ("tokenizer", "audit")])
def test_an_architecture_that_only_the_checkpoints_code_knows_is_refused(loader, poisoned, canary, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks gets a yes: nobody may ask
    edit(poisoned / "config.json", model_type="x", architectures=["XForCausalLM"])
    with pytest.raises((OpdError, ValueError)) as refused:
        LOADERS[loader](poisoned)
    assert canary.alive
    if loader == "plan":
        assert "config.json" in str(refused.value) and "auto_map" in str(refused.value)


def test_a_tokenizer_that_only_the_checkpoints_code_knows_is_refused(poisoned, canary, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    edit(poisoned / "tokenizer_config.json", tokenizer_class="XTokenizer")
    edit(poisoned / "config.json", model_type="x")
    (poisoned / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="auto_map"):
        load_tokenizer(poisoned)
    assert canary.alive


def test_weights_in_pickle_alone_are_refused(poisoned, canary):
    for path in poisoned.glob("*.safetensors"):
        path.unlink()
    for name, loader in LOADERS.items():
        if name not in ("tokenizer", "audit", "config"):
            with pytest.raises((InputError, OSError), match=r"pickle|safetensors"):
                loader(poisoned)
    assert canary.alive


def test_a_pickle_under_the_name_of_safetensors_is_refused(poisoned, canary):
    (poisoned / "model.safetensors").write_bytes(canary.pickled)
    for name, loader in LOADERS.items():
        if name not in ("tokenizer", "audit", "config"):
            with pytest.raises((OpdError, Exception), match=r"(?i)safetensors|header|load"):
                loader(poisoned)
    assert canary.alive


def test_an_adapter_that_brings_its_own_base_is_refused(poisoned):
    (poisoned / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    with pytest.raises(InputError, match="LoRA adapter"):
        plan_and_make(poisoned)


def test_other_weights_than_those_that_are_hashed_are_refused(clean, tmp_path):
    for number, change in enumerate(("field", "index")):
        folder = Path(shutil.copytree(clean, tmp_path / str(number)))
        if change == "field":
            shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
            edit(folder / "config.json", transformers_weights="other.safetensors")
        else:
            shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
            index = {"metadata": {}, "weight_map": dict.fromkeys(["w"], "other.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match=r"transformers_weights|an index of other files"):
            plan_and_make(folder)


TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['exec'](CODE) }}",
    "{{ cycler.__init__.__globals__.os.system('touch ' ~ CODE) }}",
    "{{ self.__init__.__globals__ }}{{ lipsum.__globals__['os'].popen(CODE).read() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x.__init__.__globals__ }}{% endfor %}",
    "{{ messages|attr('__class__')|attr('__mro__') }}{{ namespace.__init__.__globals__['sys'] }}",
    "{% set _ = messages.append(CODE) %}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_stay_in_their_sandbox(template, clean, tmp_path, canary):
    folder = Path(shutil.copytree(clean, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template.replace("CODE", json.dumps(canary.code)))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(Exception, match=r"unsafe|undefined|has no attribute|not allowed"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert canary.alive


TAGS = (
    "!!python/object/apply:exec [CODE]",
    "!!python/object/apply:os.system [CODE]",
    "!!python/object/apply:builtins.eval [CODE]",
    "!!python/object/new:type {args: [x, !!python/tuple [], {__init__: 1}]}",
    "!!python/object:os._wrap_close {}",
    "!!python/name:os.system ''",
    "!!python/module:os ''",
    "!!python/tuple [1]",
    "!!python/bytes eA==",
    "!!python/object/apply:subprocess.check_output {args: [CODE]}",
    "! CODE",
    "!exec CODE",
    "!!js/function CODE",
    "!<tag:yaml.org,2002:python/object/apply:exec> [CODE]",
    "{? !!python/object/apply:exec [CODE] : 1}",
)


@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_yaml_make_no_objects(tag, tmp_path, canary, example_store):
    value = tag.replace("CODE", json.dumps(canary.code))
    config = tmp_path / "config.yaml"
    config.write_text(f"seed: {value}\n")
    child = tmp_path / "child.yaml"
    child.write_text(f"base: {config.name}\n")
    run = Run.open(example_store, "demo")
    body = f"seed: {value}\n".encode()
    (run.directory / "experiment.yaml").write_bytes(body + _checksum(run.name, body))
    for read in (
        lambda: load_experiment(config),
        lambda: read_layers(child)[0][1]["seed"] + 1,
        lambda: parse_override(f"seed={value}")["seed"] + 1,
        lambda: run.experiment["seed"] + 1,
    ):
        with pytest.raises((ConfigError, CorruptArtifact, TypeError)):
            read()
    assert canary.alive
    with pytest.raises(yaml.YAMLError) if not value.startswith("! ") else pytest.raises(TypeError):
        yaml.safe_load(value) + 1


def test_prompt_files_are_data(tmp_path, canary):
    prompt = {"prompt": canary.expression, "answer": canary.code, "completion": "{{ 1 }}"}
    (tmp_path / "a.jsonl").write_text(json.dumps(prompt) + "\n")
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": canary.pickled}
    field = pa.field("prompt", pa.string(), metadata=extension)
    pq.write_table(pa.table([["a"]], schema=pa.schema([field])), tmp_path / "b.parquet")
    assert [row.prompt for row in read_rows(FileSource(path=tmp_path / "a.jsonl"))[0]] == [canary.expression]
    assert [row.prompt for row in read_rows(FileSource(path=tmp_path / "b.parquet"))[0]] == ["a"]
    (tmp_path / "c.jsonl").write_bytes(canary.pickled)
    with pytest.raises(InputError, match=r"c\.jsonl:1"):
        read_rows(FileSource(path=tmp_path / "c.jsonl"))
    assert canary.alive


def test_completions_and_answers_are_not_evaluated(canary):
    for text in (canary.expression, rf"\boxed{{{canary.expression}}}"):
        assert verify(ExactMatch(extract=r"#(.+)"), f"#{text}", "1") is False
        for completion, answer in ((text, "1"), ("1", text)):
            verify(MathVerify(timeout=3), completion, answer)
    assert canary.alive


@pytest.mark.faults
@pytest.mark.parametrize("loader", LOADERS)
def test_every_payload_alone_is_never_run(loader, clean, tmp_path, canary):
    """One file at a time, with and without configs that point at it: what hides behind another is seen too."""
    trials = 0
    for name in PICKLES + MODULES:
        for auto_map in (False, True):
            folder = Path(shutil.copytree(clean, tmp_path / f"{trials}"))
            poison(folder, canary, (name,), auto_map)
            LOADERS[loader](folder)
            assert canary.alive, name
            shutil.rmtree(folder)
            trials += 1
    assert trials == 2 * len(PICKLES + MODULES)


@pytest.mark.faults
def test_the_engine_runs_nothing_that_lies_beside_a_checkpoint(poisoned, canary, monkeypatch, tmp_path):
    from storage.artifacts.digests import weights_digest
    from tasks.engines.sampler import Sampler

    monkeypatch.chdir(poisoned)
    sampler = Sampler({"device": "cpu", "threads": 1, "kv_cache_gib": 0.125, "max_num_seqs": 8})
    store = Store(tmp_path / "store")
    prompt = {"prompt_id": "p", "split": "train", "text": "x", "token_ids": [1, 2, 3]}
    with store.building(ArtifactSpec.of("prepare", 1, {}, {})) as builder:
        builder.write_shard("prompts", 0, pa.Table.from_pylist([prompt], schema_for("prompts")))
        prompts = builder.commit()
    with store.building(ArtifactSpec.of("rollout", 1, {}, {})) as builder:
        job = SampleJob(
            store=str(store.root),
            target=ArtifactRef(builder.stage, builder.key),
            prompts=ArtifactRef.of(prompts),
            split="train",
            model=ModelRef(str(poisoned), weights_digest(poisoned), ""),
            dtype="float32",
            longest=7,
            log_table="rollouts",
        )
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_completion_length=4, stop_token_ids="eos")
        try:
            sampler.handle(job, Feed([SampleShard(0, sampling, [Request("p/1/0", "p", 0, 0)])]))
        finally:
            sampler.close()
        (row,) = store.read_table(builder.commit(), "rollouts").to_pylist()
    assert row["completion_token_ids"] and canary.alive


def test_a_trainer_state_that_holds_pickles_is_refused(tmp_path, canary):
    from tasks.trainer import state

    for kind in ("master", "exp_avg", "exp_avg_sq"):
        (tmp_path / f"{kind}.safetensors").write_bytes(canary.pickled)
    (tmp_path / "trainer.json").write_text(state.TrainerState(step=1, round=1, lr=0.1, lora=None).model_dump_json())
    with pytest.raises(CorruptArtifact, match=r"master\.safetensors"):
        state.Tensors(state.files(tmp_path, averaged=False), {"w": torch.nn.Parameter(torch.zeros(1))})
    (tmp_path / "trainer.json").write_bytes(canary.pickled)
    with pytest.raises(CorruptArtifact, match=r"trainer\.json"):
        state.read(tmp_path, None)
    assert canary.alive
