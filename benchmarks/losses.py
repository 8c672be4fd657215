"""Time and memory of losses that need the whole vocabulary: forward and backward from hidden states through the output head.

python benchmarks/losses.py [--sizes small,large] [--turns 5] [--ways "bucket plain,bucket fused"] [--trl FOLDER]

`plain` makes all logits at once; `fused` is the trainer's way; `rows` multiplies K rows of the head; `metrics` is the
trainer's way with the metrics of a logged step on, of a sixteenth of the tokens; `products` are the three matrix products
alone, in the chunks of `fused`: the floor; `trl` is TRL's chunked path, from the folder of `pip install --no-deps --target
FOLDER trl` (its distillation loss projects a teacher too: one of 16 dimensions here, so that this costs little). Memory: the
peak of resident memory above that of the inputs, less the head's own gradient, of one run of each way."""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import Tensor, nn
from turns import Spent, in_turns, machine, ratios, spread, table

from tasks.losses.build import make_objective
from tasks.losses.config import DirectConfig, PolicyGradientConfig
from tasks.losses.head import ChunkedHead, from_logits, support_of, view_of
from tasks.losses.needs import StudentRequest
from tasks.losses.products import hidden_gradient, logits_of
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

    def loss(self, name: str, chunk: int) -> Callable[[], Tensor]:
        """The loss `METHOD WAY`, with chunks of at most so many tokens."""
        method, way = name.split()
        if way == "trl":
            return self._trl(method)
        provider: Any = Plain() if way == "plain" else ChunkedHead(chunk)
        observe = way == "metrics"
        share = SHARE if observe else 1.0
        head = LossHead(self.head, make_objective(METHODS[method]), provider, None, metrics_share=share)
        forward = Forward(
            torch.zeros(1, 1, dtype=torch.int64),
            torch.arange(self.n),
            self.batch,
            torch.full((self.n,), 1 / self.n),
            counts=True,
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

    def run(self, loss: Callable[[], Tensor]) -> Spent:
        """Forward and backward."""
        self.hidden.grad = self.head.weight.grad = None
        gc.collect()
        before = Spent.now()
        loss().backward()  # type: ignore[no-untyped-call]
        return Spent.now() - before

    @torch.no_grad()
    def products(self, chunk: int) -> Spent:
        """The three matrix products of a loss, and nothing else."""
        chunk = min(chunk, max(128, self.n // 8))
        hidden, weight = self.hidden.detach(), self.head.weight.detach()
        weight_gradient = torch.zeros_like(weight)
        before = Spent.now()
        for start in range(0, self.n, chunk):
            rows = slice(start, start + chunk)
            logits = logits_of(hidden[rows], weight)
            hidden_gradient(logits, weight)
            torch.addmm(weight_gradient, logits.t(), hidden[rows], out=weight_gradient)
            del logits
        return Spent.now() - before

    def memory(self, loss: Callable[[], Tensor]) -> float:
        """MB."""
        self.hidden.grad = self.head.weight.grad = None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory that the process still has would not count again
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _resident("VmRSS")
        loss().backward()  # type: ignore[no-untyped-call]
        return _resident("VmHWM") - before - self.head.weight.numel() * 4 / 1e6


def _resident(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small", help=", ".join(SIZES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=1024, help="runtime.trainer.head_chunk_tokens")
    parser.add_argument("--ways", help="only these, METHOD WAY each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trl", help="folder with TRL")
    given = parser.parse_args()
    if given.trl:
        sys.path.append(given.trl)
    torch.set_num_threads(given.threads)
    names = [f"{method} {way}" for method in ("bucket", "sampled") for way in ("plain", "fused", "metrics")]
    names += ["rows rows", "rows metrics", *(["bucket trl", "sampled trl"] if given.trl else [])]
    if given.ways:
        names = given.ways.split(",")
    print(machine())
    for size in given.sizes.split(","):
        measure(Case(size, given.trl), size, names, given.turns, given.chunk)


def measure(case: Case, size: str, names: list[str], turns: int, chunk: int) -> None:
    """Prints the table of one size."""
    losses = {name: case.loss(name, chunk) for name in names}
    ways = {name: lambda loss=loss: case.run(loss) for name, loss in losses.items()}
    found = in_turns(ways | {"products": lambda: case.products(chunk)}, turns)
    memory = {name: case.memory(loss) for name, loss in losses.items()}
    work = 3 * 2 * case.n * case.d * case.v
    rows = []
    for name, spent in found.items():
        plain = f"{name.split()[0]} plain"
        row = [name, spread(one.cpu for one in spent)]
        row += [spread(ratios(spent, found[plain], kind)) if plain in found else "" for kind in ("cpu", "clock")]
        row += [spread(ratios(spent, found["products"]))]
        row += [f"{memory[name]:,.0f}" if name in memory else ""]
        row += [f"1/{memory[plain] / memory[name]:.3g}" if plain in memory and name in memory else ""]
        rows.append(row)
        if name.endswith((" fused", " trl")):
            where = f"loss {name}, d = {case.d}, of plain"
            if plain in found:
                record(f"{where}: time", ratios(spent, found[plain]), "at most 1.25")
            if plain in memory:
                record(f"{where}: memory", [memory[name] / memory[plain]], "at most 0.125")
    if {"rows rows", "bucket fused"} <= found.keys():
        of_bucket = ratios(found["rows rows"], found["bucket fused"])
        record(f"loss over K rows (renormalize), d = {case.d}, of bucket: time", of_bucket, "at most 0.1")
    rate = spread(work / 1e9 / one.cpu for one in found["products"])
    print(f"\n{size}: T = {case.n}, d = {case.d}, V = {case.v:,}; products: {work / 1e9:.0f} GFLOP at {rate} GFLOP/s\n")
    columns = ("loss", "CPU seconds", "of plain", "clock, of plain", "of the products", "extra MB", "of plain's")
    table(columns, rows)


if __name__ == "__main__":
    main()
