"""Run by every rank of a test: loads a checkpoint as the trainer does at ZeRO stage 3, and writes what this rank held."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file

from tasks.trainer.config import OptimizerSettings
from tasks.trainer.engine import full_shape, load_for, start
from tasks.trainer.lora import add_adapters
from tasks.trainer.model import load_model, trainable
from tasks.trainer.state import Tensors, load_weights


def main(base: Path, config: str, dtype: str, out: Path) -> None:
    start()
    settings = OptimizerSettings(
        lr=1e-3, dtype=dtype, lora={"r": 4, "target_modules": ("q_proj",)} if out.name == "lora" else None
    )
    model = load_for(config, settings, base)
    held = sum(parameter.numel() for parameter in model.parameters())
    pieces = {name: p.ds_tensor.numel() for name, p in model.named_parameters() if hasattr(p, "ds_tensor")}
    if settings.lora is not None:
        add_adapters(model, settings.lora)
    shapes = {name: list(full_shape(parameter)) for name, parameter in model.named_parameters()}
    expected = load_file(base / "model.safetensors")
    equal = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if name.replace(".base_layer", "") in expected:
                equal[name] = torch.equal(parameter, expected[name.replace(".base_layer", "")].to(parameter.dtype))
    loaded = {}
    if (base / "state").is_dir():  # weights of a state, into parameters that are in pieces
        parameters = trainable(model)
        tensors = Tensors(sorted((base / "state").glob("*.safetensors")), parameters)
        load_weights(tensors, parameters)
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                loaded[name] = torch.equal(parameter, tensors[f"master/{name}"].to(parameter.dtype))
    whole = load_model(base, dtype)
    found, wanted = dict(model.named_buffers()), dict(whole.named_buffers())
    assert found.keys() == wanted.keys()
    buffers = {name: found[name].dtype == b.dtype and torch.equal(found[name], b) for name, b in wanted.items()}
    report = {"buffers": buffers, "held": held, "pieces": pieces, "shapes": shapes, "equal": equal, "loaded": loaded}
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
