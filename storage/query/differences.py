"""The SQL of the view `differences`: the formulas of `storage.query.figures`."""

from __future__ import annotations

from storage.query.figures import MODES, Z95


def differences(evaluations: str) -> str:
    """The SELECT over `evaluations`, itself one. Filters on run and round reach the evaluations' shards."""
    shape = {mode: f"bool_or(mode = '{mode}') OVER (PARTITION BY run, \"round\")" for mode in MODES[:2]}
    rows = (
        'SELECT run, "round", artifact, prompt_id, mode, tokens, correct, reverse_kl_sum, finish_reason,'
        f" CASE WHEN {shape['kl']} THEN 'kl' WHEN {shape['sampled']} THEN 'sampled' ELSE 'greedy' END AS shape"
        f" FROM ({evaluations}) WHERE run IS NOT NULL"
    )
    parts = [
        ("accuracy_greedy", "correct::INTEGER", "1", "mode = 'greedy' AND correct IS NOT NULL"),
        ("accuracy_sampled", "correct::INTEGER", "1", "mode = 'sampled' AND correct IS NOT NULL"),
        ("reverse_kl", "reverse_kl_sum", "tokens", "mode = 'kl' AND isfinite(reverse_kl_sum)"),
        ("mean_length", "tokens", "1", "mode = shape"),
        ("clipped_ratio", "(finish_reason = 'length')::INTEGER", "1", "mode = shape"),
    ]
    sums = " UNION ALL ".join(
        f"SELECT run, \"round\", artifact, '{name}' AS metric, prompt_id, sum({total})::DOUBLE AS total,"
        f" sum({weight})::DOUBLE AS weight FROM rows_ WHERE {where} GROUP BY ALL"
        for name, total, weight, where in parts
    )
    pair = 'run, "round", artifact, other_run, other_round, metric'
    both = (
        'SELECT one.run, one."round", one.artifact, one.metric, other.run AS other_run, other."round" AS other_round,'
        " one.total AS y, one.weight AS w, other.total AS z, other.weight AS v"
        " FROM sums_ AS one JOIN sums_ AS other USING (metric, prompt_id)"
        ' WHERE (one.run, one."round") <> (other.run, other."round")'
    )
    moved = (
        f"SELECT {pair}, sum(y) OVER pair / sum(w) OVER pair AS value, sum(z) OVER pair / sum(v) OVER pair AS minus,"
        " (y - value * w) / sum(w) OVER pair - (z - minus * v) / sum(v) OVER pair AS d"
        f" FROM both_ WINDOW pair AS (PARTITION BY {pair})"
    )
    found = (
        f"SELECT {pair}, any_value(value) - any_value(minus) AS difference, count(*) AS prompts,"
        " CASE WHEN count(*) > 1 THEN sqrt(count(*) / (count(*) - 1) * sum(d * d)) END AS se"
        " FROM moved_ GROUP BY ALL"
    )
    return (
        f"WITH rows_ AS ({rows}), sums_ AS ({sums}), both_ AS ({both}), moved_ AS ({moved}), found_ AS ({found})"
        f" SELECT *, difference - {Z95} * se AS low, difference + {Z95} * se AS high,"
        " coalesce(low > 0 OR high < 0, false) AS told_apart FROM found_"
    )
