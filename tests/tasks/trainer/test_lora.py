"""LoRA: the student that is trained is the student that is exported, in every dtype."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from trainer_world import World, make, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from storage.errors import ConfigError, OpdError
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.train import train_work
from tasks.trainer.config import LoraSettings, TrainConfig, WarmupConfig
from tasks.trainer.export import export_student
from tasks.trainer.lora import MergedLinear, add_adapters, lora_layers, require_trained, trained_weights
from tasks.trainer.model import load_model, trainable
from tasks.warmup import warmup_work
from tasks.workers.pool import CHECKOUT, Worker

BUCKET = DirectConfig(support=TopkSupport(k=8, outside="bucket"))
LORA = LoraSettings(r=4, alpha=8, target_modules=("q_proj", "down_proj"))
IDS = torch.arange(20)[None]


def small_update(model: nn.Module) -> dict[str, torch.Tensor]:
    """Float32 masters of adapters whose update is far below a bfloat16 step of the weights, as at a small lr."""
    torch.manual_seed(3)
    return {name: 3e-3 * torch.randn(p.shape) for name, p in trainable(model).items()}


def folder_of(tmp_path: Path, model: nn.Module) -> Path:
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("dtype", "kind", "targets"),
    [
        ("bfloat16", "qwen3", ("q_proj", "down_proj")),
        ("bfloat16", "gpt2", ("c_attn", "c_fc")),  # Conv1D: weights (in, out), with biases
        ("float32", "qwen3", ("q_proj", "down_proj")),
    ],
)
def test_the_exported_student_computes_what_the_trainer_computed(tmp_path, dtype, kind, targets):
    torch.manual_seed(0)
    source = (
        tiny_model(1) if kind == "qwen3" else GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    )
    base, lora = folder_of(tmp_path, source), LoraSettings(r=4, alpha=8, target_modules=targets)
    live = load_model(base, dtype)
    add_adapters(live, lora)
    masters = small_update(live)
    for name, parameter in trainable(live).items():
        parameter.data.copy_(masters[name])
    live.eval()
    (tmp_path / "out").mkdir()
    metrics = export_student(tmp_path / "out", base, base, masters.items(), dtype, lora, trained_weights(live))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        ours, theirs, before = (model(IDS).logits for model in (live, exported, load_model(base, dtype).eval()))
    if dtype == "bfloat16":
        assert torch.equal(ours, theirs) and not torch.equal(ours, before)
        assert metrics["export_error"] == 0
        assert 0.3 < metrics["update_rounded_away"] < 1  # what the export of an adapted forward would have lost
    else:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert metrics["export_error"] < 1e-3 and metrics["update_rounded_away"] < 1e-3


@pytest.mark.parametrize("layer", [nn.Linear(12, 8), nn.Linear(12, 8, bias=False), Conv1D(8, 12)])
def test_gradients_are_those_of_the_merged_weight(layer):
    """In float32, where nothing is rounded: autograd through W + s B A."""
    torch.manual_seed(0)
    model = nn.Sequential(layer).bfloat16()
    model.dtype = torch.bfloat16  # as a PreTrainedModel says it
    add_adapters(model, LoraSettings(r=3, alpha=6, target_modules=("0",)))
    model = model.float()
    [(_, adapted)] = lora_layers(model)
    assert isinstance(adapted, MergedLinear)
    nn.init.normal_(adapted.lora_B["default"].weight)
    x = torch.randn(5, 7, 12, requires_grad=True)
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    found = torch.autograd.grad(model(x).square().sum(), (x, a, b))
    delta = 2 * b @ a
    weight = adapted.get_base_layer().weight
    merged = weight + delta if isinstance(layer, nn.Linear) else weight.T + delta
    expected = torch.autograd.grad(F.linear(x, merged, layer.bias).square().sum(), (x, a, b))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_dropout_of_adapters_is_noise_around_the_merged_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).bfloat16()
    model.dtype = torch.bfloat16
    add_adapters(model, LoraSettings(r=3, alpha=6, dropout=0.5, target_modules=("0",)))
    model = model.float()
    [(_, adapted)] = lora_layers(model)
    nn.init.normal_(adapted.lora_B["default"].weight)
    x = torch.randn(4, 16)
    expected = model.eval()(x).detach()
    noisy = torch.stack([model.train()(x) for _ in range(4000)]).detach()
    assert not torch.equal(noisy[0], noisy[1])
    assert float((noisy.mean(0) - expected).abs().max()) < 0.15 * float(noisy.std(0).mean())


def test_adapters_of_other_layers_are_refused_in_16_bits(tmp_path):
    model = load_model(folder_of(tmp_path, tiny_model(1, tied=False)), "bfloat16")
    settings = LoraSettings.model_construct(r=4, alpha=8.0, dropout=0.0, target_modules=("embed_tokens",))
    with pytest.raises(ConfigError, match="embed_tokens"):
        add_adapters(model, settings)


def test_an_export_that_differs_is_refused():
    require_trained(0.01, 0.01)
    for error in (0.02, float("inf")):
        with pytest.raises(OpdError, match="max_export_error"):
            require_trained(error, 0.01)


@pytest.mark.parametrize(("ranks", "zero"), [(1, "zero0"), (2, "zero3")])
def test_bfloat16_rounds_go_on_from_the_student_that_was_exported(
    world: World, trainers: dict[int, Worker], ranks: int, zero: str
) -> None:
    """At lr 0 a second round's loss is the exported student's; with separate adapters it was that of another one."""
    runtime = {"deepspeed": str(CHECKOUT / "configs" / "deepspeed" / f"{zero}.json")}
    settings = TrainConfig(lr=2e-3, samples_per_step=12, epochs_per_round=3, dtype="bfloat16", lora=LORA)
    work = train_work(settings, BUCKET, world.student, None, world.rollouts, world.signals, 0, 1)
    first = make(work, world.store, trainers[ranks], f"lora {ranks}", **runtime)
    metrics = first.artifacts["train"].meta["metrics"]
    assert metrics["export_error"] == 0 and 0.01 < metrics["update_rounded_away"] < 1
    after = load_file(world.store.materialize(first.artifacts["student"]) / "model.safetensors")
    before = load_file(world.store.materialize(world.student) / "model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name].bfloat16())}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    losses = []
    for adapters, state in ((LORA, first.artifacts["trainer_state"]), (None, None)):
        still = TrainConfig(lr=0, samples_per_step=12, dtype="bfloat16", lora=adapters)
        student = first.artifacts["student"]
        again = train_work(still, BUCKET, student, state, world.rollouts, world.signals, 0, 2)
        losses.append(make(again, world.store, trainers[ranks], f"still {ranks}", **runtime).losses[0])
    assert losses[0] == losses[1]


def test_only_keys_of_lora_in_16_bits_change(world: World) -> None:
    def identities(**fields):
        settings = TrainConfig.model_validate({"lr": 1e-3, "samples_per_step": 4} | fields)
        work = train_work(settings, BUCKET, world.student, None, world.rollouts, world.signals, 0, 1)
        warm = WarmupConfig.model_validate({"lr": 1e-3, "steps": 1} | fields)
        own = warmup_work(warm, world.student, world.prompts, 0)
        return [spec.identity for found in (work, own) for spec in found.outputs.values()]

    for fields in ({}, {"dtype": "bfloat16"}, {"lora": {"r": 4}}):
        assert not any("lora_forward" in identity for identity in identities(**fields))
    assert all("lora_forward" in identity for identity in identities(dtype="bfloat16", lora={"r": 4}))


def test_rounds_share_the_frozen_weights(world: World, trainers: dict[int, Worker]) -> None:
    """The base of a state is a hard link to that of the round before; it is intact when the earlier one is gone."""
    settings = TrainConfig(lr=1e-3, samples_per_step=12, lora=LORA)
    first = make(
        train_work(settings, BUCKET, world.student, None, world.rollouts, world.signals, 0, 1),
        world.store,
        trainers[1],
        "linked",
    )
    student, state = first.artifacts["student"], first.artifacts["trainer_state"]
    second = make(
        train_work(settings, BUCKET, student, state, world.rollouts, world.signals, 0, 2),
        world.store,
        trainers[1],
        "linked",
    )
    bases = [world.store.materialize(made.artifacts["trainer_state"], "state") / "base" for made in (first, second)]
    own = world.store.materialize(world.student) / "model.safetensors"
    files = [own, *(base / "model.safetensors" for base in bases)]
    assert len({file.stat().st_ino for file in files}) == 1
    content = own.read_bytes()
    shutil.rmtree(bases[0])
    assert files[2].read_bytes() == content
    shutil.copytree(bases[1], bases[0])  # other tests may read it
