"""The whole loop beside TRL's DistillationTrainer: the same models, prompts, sampling, steps and optimizer, one after the other.

pip install --no-deps --target TRL "trl==1.16.*"
python benchmarks/beside_trl.py PAIR TRL [--tokens 48] [--steps 4] [--rounds 4] [--dtype float32]

PAIR: a folder with student, teacher and train.jsonl, eval.jsonl: `python benchmarks/smollm2.py PAIR` writes one, and
`python benchmarks/beside_trl.py --addition PAIR` one of the demo's models. TRL minimises the reverse KL over all ids on
completions of each step; we take the teacher's 64 likeliest ids and the rest as one category, and draw the completions of
`--steps` steps at once. Evaluation is left out. Prints for both the completion tokens per second after the start-up (TRL: without
its first step; ours: from the start of round 2 to the end of the last one), their ratio, and the peak memory of all processes."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from record import record

ROOT = Path(__file__).resolve().parent.parent
LR = 1e-4
TRAINED = "trained"
"""Folder of the trained student."""


class Peak:
    """The largest proportional set size of a process and its descendants, in GB, sampled each second, and what each had then."""

    def __init__(self, pid: int) -> None:
        self.gb = 0.0
        self.parts: dict[str, float] = {}
        self._process, self._done = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(1):
            parts: dict[str, float] = {}
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    name = next(
                        (word for word in ("sampler", "scorer", "trainer") if word in process.cmdline()), "other"
                    )
                    parts[name] = parts.get(name, 0.0) + process.memory_full_info().pss / 1e9
            except psutil.Error:  # a process that ended
                continue
            if sum(parts.values()) > self.gb:
                self.gb, self.parts = sum(parts.values()), parts

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def watched(command: list[str], environment: dict[str, str], see: Callable[[float, str], None]) -> Peak:
    """Runs a command; `see` gets each line of its output, with the seconds since the start. RuntimeError where it fails."""
    begun = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    ) as process:
        peak = Peak(process.pid)
        last: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            last = [*last[-30:], line]
            see(time.perf_counter() - begun, line)
        peak.stop()
    if process.returncode:
        raise RuntimeError(f"{command[:3]} ended with {process.returncode}:\n{''.join(last)}")
    return peak


def ours(options: argparse.Namespace, folder: Path) -> tuple[list[float], Peak]:
    """Seconds per round of rounds 2 and later, and the peak of memory. The student goes to `folder / TRAINED`."""
    config = {
        "student": {"source": str((options.pair / "student").absolute())},
        "teacher": {"source": str((options.pair / "teacher").absolute())},
        "prompts": {
            "train": {"kind": "file", "path": str((options.pair / "train.jsonl").absolute())},
            "eval": {"kind": "file", "path": str((options.pair / "eval.jsonl").absolute())},
        },
        "rollout": {
            "prompts_per_round": options.samples * options.steps,
            "shard_prompts": options.samples * options.steps,
            "max_completion_length": options.tokens,
            "top_p": 1.0,
            "dtype": options.dtype,
        },
        "objective": {
            "estimator": "direct",
            "divergence": {"kind": "reverse_kl"},
            "support": {"kind": "teacher_topk", "k": options.k, "outside": "bucket"},
        },
        "supervise": {"student": "none", "dtype": options.dtype},
        "train": {"samples_per_step": options.samples, "lr": LR, "dtype": options.dtype, "metrics_every": 1000},
        "evaluate": {"prompts": 1, "kl_prompts": 0, "verifier": None, "max_completion_length": 8},
        "runtime": {
            "threads": 2,
            "sampler": {"max_num_seqs": 512, "kv_cache_gib": 0.5},
            "trainer": {"checkpoint_minutes": None},
        },
        "policy": {"rounds": options.rounds, "evaluate_every": 1000},
        "seed": options.seed,
    }
    if options.plain:
        config["prompts"] |= {"chat_template": False}
    (folder / "config.yaml").write_text(json.dumps(config))
    starts: dict[int, float] = {}

    def see(seconds: float, line: str) -> None:
        if options.verbose:
            print(f"{seconds:8.1f}  {line}", end="", flush=True)
        if not line.startswith('{"event": "stage"'):
            return
        event = json.loads(line)
        if event["stage"] == "rollout":
            starts.setdefault(event["round"], seconds)
        if event["stage"] == "evaluate":
            starts.setdefault(event["round"] + 1, seconds)

    command = [str(Path(sys.executable).parent / "opd"), "run", str(folder / "config.yaml"), "--name", "beside-trl"]
    peak = watched([*command, "--root", str(folder / "store"), "--no-prefect", "--json"], {}, see)
    if options.evaluate:
        export = [command[0], "export", "beside-trl", str(folder / TRAINED), "--root", str(folder / "store")]
        subprocess.run(export, check=True, capture_output=True)
    return [starts[r + 1] - starts[r] for r in range(2, options.rounds + 1)], peak


def trl(options: argparse.Namespace, folder: Path) -> tuple[list[float], Peak]:
    """Seconds per step of steps 2 and later, and the peak of memory. The student goes to `folder / TRAINED`."""
    steps = []

    def see(seconds: float, line: str) -> None:
        if options.verbose:
            print(f"{seconds:8.1f}  {line}", end="", flush=True)
        if found := re.match(r"step (\d+) seconds ([\d.]+)", line):
            steps.append(float(found[2]))

    environment = {"PYTHONPATH": str(options.trl), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    peak = watched([sys.executable, __file__, *sys.argv[1:], "--child", str(folder)], environment, see)
    return steps[1:], peak


def train_with_trl(options: argparse.Namespace, folder: Path) -> None:
    """The child process: TRL's trainer, with a line per step. The student goes to `folder / TRAINED`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Steps(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            print(f"step {state.global_step} seconds {time.perf_counter() - self.begun:.3f}", flush=True)

    torch.set_num_threads(2)
    steps = options.steps * options.rounds if options.trl_steps is None else options.trl_steps
    rows = [json.loads(line)["prompt"] for line in (options.pair / "train.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"prompt": row if options.plain else [{"role": "user", "content": row}]} for row in rows])
    dtype = getattr(torch, options.dtype)
    models = [AutoModelForCausalLM.from_pretrained(options.pair / name, dtype=dtype) for name in ("student", "teacher")]
    tokenizer = AutoTokenizer.from_pretrained(options.pair / "student", padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as output:
        trainer = DistillationTrainer(
            model=models[0],
            teacher_model=models[1],
            processing_class=tokenizer,
            train_dataset=data,
            callbacks=[Steps()],
            args=DistillationConfig(
                output_dir=output,
                max_steps=steps,
                per_device_train_batch_size=options.samples,
                gradient_accumulation_steps=1,
                max_completion_length=options.tokens,
                learning_rate=LR,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                beta=1.0,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                logging_steps=1000,
                disable_tqdm=True,
                seed=options.seed,
            ),
        )
        trainer.train()
    if options.evaluate:
        models[0].save_pretrained(folder / TRAINED)


def reverse_kl(options: argparse.Namespace, student: Path) -> tuple[float, float]:
    """Reverse KL of a student to the teacher in nats per token of its own completions, and the standard error over prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.pair / "student")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, options.pair / "teacher")
    ]
    rows = [json.loads(line)["prompt"] for line in (options.pair / "eval.jsonl").read_text().splitlines()]
    torch.set_num_threads(2)
    torch.manual_seed(0)
    found = []
    for row in rows[: options.evaluate]:
        turn = [{"role": "user", "content": row}]
        text = row if options.plain else tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=options.plain).input_ids
        with torch.inference_mode():
            whole = models[0].generate(ids, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=options.tokens)  # type: ignore[misc]
            p, q = (model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1) for model in models)
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5


def addition(pair: Path) -> None:
    """The demo's models after their warm-ups, and its prompts as plain texts."""
    opd, root = str(Path(sys.executable).parent / "opd"), pair / "store"
    config = [str(ROOT / "configs" / "quickstart.yaml"), "--name", "pair", "--root", str(root), "--no-prefect"]
    subprocess.run([opd, "run", *config, "--set", "policy.rounds=1"], check=True)
    for name, more in (("student", ["--round", "0"]), ("teacher", ["--teacher"])):
        subprocess.run([opd, "export", "pair", str(pair / name), "--root", str(root), *more], check=True)
    for split in ("train", "eval"):
        sql = f"SELECT text AS prompt FROM prompts WHERE split = '{split}' ORDER BY prompt_id"
        shown = subprocess.run(
            [opd, "query", sql, "--root", str(root), "--json"], check=True, capture_output=True, text=True
        )
        rows = json.loads(shown.stdout)
        (pair / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("trl", type=Path, nargs="?")
    parser.add_argument("--addition", action="store_true", help="write the demo's models to PAIR and end")
    parser.add_argument("--plain", action="store_true", help="prompts without a chat template (the addition pair)")
    parser.add_argument("--tokens", type=int, default=48, help="of a completion")
    parser.add_argument("--samples", type=int, default=16, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--trl-steps", type=int, help="steps of TRL; default: as many as ours")
    parser.add_argument("--k", type=int, default=64, help="of the teacher's list")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--only", choices=("ours", "trl"))
    parser.add_argument("--evaluate", type=int, default=0, help="held-out prompts of the reverse KL; 0: none")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train_with_trl(options, options.child)
        return
    if options.addition:
        addition(options.pair)
        return
    speeds, memory, values = {}, {}, {}
    if options.evaluate:
        values["before"] = reverse_kl(options, options.pair / "student")
    print("who,seconds_per_step,spread,tokens_per_s,peak_gb,parts")
    for who, half, steps in (("trl", trl, 1), ("ours", ours, options.steps)):
        if options.only not in (None, who):
            continue
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak = half(options, Path(folder))
            if options.evaluate:
                values[who] = reverse_kl(options, Path(folder) / TRAINED)
        each = [s / steps for s in seconds]
        middle = statistics.median(each)
        speeds[who] = options.samples * options.tokens / middle
        memory[who] = peak.gb
        parts = " ".join(f"{name} {gb:.2f}" for name, gb in sorted(peak.parts.items()))
        print(f"{who},{middle:.3f},{min(each):.3f}-{max(each):.3f},{speeds[who]:.1f},{peak.gb:.2f},{parts}", flush=True)
    for who, (mean, error) in values.items():
        print(f"reverse KL, {who}: {mean:.4f} +- {error:.4f} nats per token, {options.evaluate} prompts")
    if len(speeds) == 2:
        print(f"ratio,{speeds['ours'] / speeds['trl']:.3f}")
        what = f"whole loop, {options.tokens} tokens, {options.dtype}, rounds of {options.steps} steps, of TRL"
        record(f"{what}: tokens per second", [speeds["ours"] / speeds["trl"]], "at least 1.5")
        record(f"{what}: peak memory", [memory["ours"] / memory["trl"]], "below 1")


if __name__ == "__main__":
    main()
