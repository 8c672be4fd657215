"""What `make demo-text` shows at its end: the reverse KL by round, and greedy completions before and after distillation.

python benchmarks/demo_text.py NAME [ROOT]    (ROOT: as of `opd --root`)"""

from __future__ import annotations

import os
import sys
import textwrap

import opdflow

SHOWN = 3
"""Prompts."""

SQL = """
SELECT first.prompt_id AS id, first.completion_text AS before, last.completion_text AS after, p.text AS prompt
FROM evaluations AS first
JOIN evaluations AS last USING (prompt_id, mode, sample_index)
JOIN prompts AS p USING (prompt_id)
WHERE mode = 'greedy' AND first.round = 0 AND last.round = (SELECT max(round) FROM evaluations)
ORDER BY id
"""


def main(name: str, root: str | None = None) -> None:
    run = opdflow.open(root or os.environ.get("OPD_ROOT", "opd-store")).run(name)
    for row in run.sql(
        "SELECT round, reverse_kl, reverse_kl_se FROM rounds WHERE reverse_kl IS NOT NULL ORDER BY round"
    ):
        bar = "#" * round(10 * row["reverse_kl"])
        print(f"round {row['round']}  reverse KL {row['reverse_kl']:.3f} ± {row['reverse_kl_se']:.3f}  {bar}")
    rows = run.sql(SQL).rows()
    for row in rows[:: max(1, len(rows) // SHOWN)][:SHOWN]:
        asked = row["prompt"].rpartition("user\n")[2].partition("<|im_end|>")[0]  # of the chat template
        print()
        for what, text in (("prompt", asked), ("before", row["before"]), ("after", row["after"])):
            print(textwrap.fill(f"{what:9}{text}", 100, subsequent_indent=" " * 9))


if __name__ == "__main__":
    main(*sys.argv[1:])
