"""Time and memory of losses that need the whole vocabulary: forward and backward from hidden states through the output head.

python benchmarks/losses.py [--sizes small,large] [--repeats 5] [--chunks 1024] [--trl FOLDER]

`plain` makes all logits at once; `fused` is the trainer's way, with chunks of at most so many tokens; `rows` multiplies K rows of
the head; `metrics` is the trainer's way with the metrics of a logged step on, of a sixteenth of the tokens; `trl` is TRL's
chunked path, from the folder of `pip install --no-deps --target FOLDER trl` (its distillation loss projects a teacher too: one of
16 dimensions here, so that this costs little). All run in turn in one process, so that their ratios hold on a machine that others
use as well; CPU seconds are the process's. Memory: the peak of resident memory above that of the inputs, less the head's own
gradient."""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.losses.build import make_objective
from tasks.losses.config import DirectConfig, PolicyGradientConfig
from tasks.losses.head import ChunkedHead, from_logits, support_of, view_of
from tasks.losses.needs import StudentRequest
from tasks.losses.types import StudentView, TokenBatch
from tasks.trainer.data import Forward
from tasks.trainer.model import LossHead

SIZES = {
    "small": (512, 256, 151_936),
    "wide": (512, 1024, 151_936),
    "large": (2048, 1024, 151_936),
    "tiny": (64, 32, 1000),
}
K = 32
SHARE = 1 / 16
"""Of the tokens, for metrics."""
METHODS: dict[str, Any] = {
    "bucket": DirectConfig.model_validate({"support": {"kind": "teacher_topk", "k": K, "outside": "bucket"}}),
    "rows": DirectConfig.model_validate({"support": {"kind": "teacher_topk", "k": K, "outside": "renormalize"}}),
    "sampled": PolicyGradientConfig.model_validate({}),
}


class Plain:
    """A head provider that makes all logits at once."""

    def __call__(self, hidden_ND: Tensor, head: nn.Module, batch: TokenBatch, request: StudentRequest) -> StudentView:
        return view_of(from_logits(head(hidden_ND), batch.token_ids_N, *support_of(batch, request), request))


class Case:
    """Inputs of one size, and a loss for each name."""

    def __init__(self, size: str, trl: str | None) -> None:
        self.n, self.d, self.v = SIZES[size]
        torch.manual_seed(0)
        self.hidden = torch.randn(self.n, self.d, requires_grad=True)
        self.head = nn.Linear(self.d, self.v, bias=False)
        nn.init.normal_(self.head.weight, std=self.d**-0.5)
        draw = torch.randn(self.n, K).sort(-1, descending=True).values
        teacher = (draw - draw.logsumexp(-1, keepdim=True)) + torch.tensor(0.9).log()
        tokens = torch.randint(0, self.v, (self.n,))
        self.batch = TokenBatch(
            token_ids_N=tokens,
            loss_mask_N=torch.ones(self.n),
            sample_N=torch.zeros(self.n, dtype=torch.int64),
            position_N=torch.arange(self.n),
            student_logprobs_N=torch.full((self.n,), -9.0),
            teacher_logprobs_N=torch.full((self.n,), -8.0),
            support_ids_NK=(tokens.unsqueeze(-1) + torch.arange(K) * 4733) % self.v,
            support_valid_N=torch.full((self.n,), K),
            teacher_support_logprobs_NK=teacher,
            teacher_tail_logmass_N=torch.full((self.n,), 0.1).log(),
        )
        if trl is not None:
            self.teacher_hidden, self.teacher_weight = torch.randn(self.n, 16), torch.randn(self.v, 16) / 4

    def loss(self, name: str) -> Callable[[], Tensor]:
        """The loss `METHOD WAY [CHUNK]`."""
        method, way, *chunk = name.split()
        if way == "trl":
            return self._trl(method)
        provider: Any = Plain() if way == "plain" else ChunkedHead(int(chunk[0]) if chunk else 1024)
        observe = way == "metrics"
        share = SHARE if observe else 1.0
        head = LossHead(self.head, make_objective(METHODS[method]), provider, None, metrics_share=share)
        forward = Forward(
            torch.zeros(1, 1, dtype=torch.int64),
            torch.arange(self.n),
            self.batch,
            torch.full((self.n,), 1 / self.n),
        )
        assert head.fuses(self.batch) == (way != "plain" and method != "rows"), name
        return lambda: head(self.hidden, forward, observe)

    def _trl(self, method: str) -> Callable[[], Tensor]:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        weight, tokens = self.head.weight, self.batch.token_ids_N
        if method == "sampled":
            apply: Any = ChunkedLogProbFunction.apply
            return lambda: -apply(self.hidden, weight, None, tokens, 1.0, 32_768, None, 1.0, ())[0].mean()
        other: Any = ChunkedDivergenceFunction.apply
        given = (self.teacher_hidden, self.teacher_weight, None, 1.0)
        return lambda: other(self.hidden, weight, None, *given)[0].mean()

    def run(self, loss: Callable[[], Tensor]) -> tuple[float, float, float]:
        """Seconds, CPU seconds and MB of forward and backward."""
        self.hidden.grad = self.head.weight.grad = None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory that the process still has would not count again
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _resident("VmRSS")
        began, used = time.perf_counter(), _cpu()
        loss().backward()  # type: ignore[no-untyped-call]
        seconds, cpu = time.perf_counter() - began, _cpu() - used
        return seconds, cpu, _resident("VmHWM") - before - self.head.weight.numel() * 4 / 1e6


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="small,large")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunks", default="1024")
    parser.add_argument("--methods", default="bucket,sampled")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--trl")
    given = parser.parse_args()
    if given.trl:
        sys.path.append(given.trl)
    torch.set_num_threads(given.threads)
    names = ["rows rows", "rows metrics"]
    for method in given.methods.split(","):
        names += [f"{method} plain", *(f"{method} fused {chunk}" for chunk in given.chunks.split(","))]
        names += [f"{method} metrics", *([f"{method} trl"] if given.trl else [])]
    print("size,loss,s_median,s_least,s_most,cpu_s_median,extra_mb,time_to_plain,cpu_to_plain,memory_to_plain")
    for size in given.sizes.split(","):
        case = Case(size, given.trl)
        losses = {name: case.loss(name) for name in names}
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
        for repeat in range(given.repeats + 1):
            for name, loss in losses.items():
                measured = case.run(loss)
                print(
                    f"{size} {repeat} {name}: " + ", ".join(f"{value:.3g}" for value in measured),
                    file=sys.stderr,
                    flush=True,
                )
                if repeat:  # the first fills caches
                    found[name].append(measured)
        for name in names:
            seconds, cpu, memory = zip(*found[name], strict=True)
            row = [statistics.median(seconds), min(seconds), max(seconds), statistics.median(cpu), max(memory)]
            plain = found.get(f"{name.split()[0]} plain")
            if plain is not None:  # each repeat against plain's of the same turn
                for place in range(3):
                    row.append(statistics.median(a[place] / b[place] for a, b in zip(found[name], plain, strict=True)))
            print(",".join([size, name, *(f"{value:.3g}" for value in row)]), flush=True)


if __name__ == "__main__":
    main()
