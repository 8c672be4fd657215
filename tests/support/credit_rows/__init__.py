"""A second, plain implementation of `estimator: credit` (docs/objectives.md): loops over samples and tokens, in float64, one
function per row.

It shares no code with the product and is what the product is compared with. `toy.py` describes the input, `terms.py` has
the pieces of the expression, `rewarded.py` and `distilled.py` the rows. `ROWS` names them as the recipes do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import distilled, rewarded
from .rewarded import Gate
from .terms import Clip, Reduction, Result
from .toy import Sample, Toy, toys

ROWS: dict[str, Callable[..., Result]] = {
    "grpo": rewarded.grpo,
    "sdpo": distilled.sdpo,
    "srpo": distilled.srpo,
    "sdft": distilled.sdft,
    "opsd-script": distilled.opsd_script,
    "opsd-paper": distilled.opsd_paper,
    "rlrt": rewarded.rlrt,
    "rlsd": rewarded.rlsd,
    "visd": rewarded.visd,
    "antisd": rewarded.antisd,
    "dasd": rewarded.dasd,
    "sod": rewarded.sod,
    "trace": distilled.trace,
    "ptd-po": rewarded.ptd_po,
    "resd": distilled.resd,
    "pbsd": distilled.pbsd,
    "distil": distilled.distil,
    "iw-opd": rewarded.iw_opd,
    "vopd": rewarded.vopd,
    "power-opd": rewarded.power_opd,
    "veto": distilled.veto,
    "sdar": rewarded.sdar,
    "sdpg": rewarded.sdpg,
    "top-d": rewarded.top_d,
    "opd": rewarded.opd,
}

# What a row needs on `toys`: the fields without a default, and a top k below the vocabulary, so that there is a tail.
ON_TOYS: dict[str, dict[str, Any]] = {
    "sdpo": {"top_k": 3},
    "srpo": {"top_k": 3},
    "sdft": {"top_k": 3},
    "visd": {"top_k": 3},
    "antisd": {"gate": Gate(step=9, warm=0.1, g=1)},
    "dasd": {"entropy_of": "q", "normalise": lambda d: d, "beta": 0.7},
    "trace": {"lam": 0.3, "term_clip": 0.2, "coverage": 0.5},
    "ptd-po": {"top_k": 3},
    "resd": {"top_k": 3},
    "pbsd": {"beta": 0.1},
    "veto": {"beta": 0.8},
    "top-d": {"a": 0.5},
}

__all__ = ["ON_TOYS", "ROWS", "Clip", "Gate", "Reduction", "Result", "Sample", "Toy", "toys"]
