-- Mean length of right and of wrong completions, round by round: of the judged held-out ones, or of the rollouts by their rewards.
-- se is clustered by prompt (docs/figures.md).
-- $of = evaluations | rollouts: which completions
-- $success = 0.5: reward from which a rollout counts as right
-- $first = 0: rounds from this one on, where the rollouts of earlier ones were removed
WITH judged AS (
  SELECT round, mode, prompt_id, correct, tokens
  FROM evaluations
  WHERE $of = 'evaluations' AND correct IS NOT NULL AND round >= $first
  UNION ALL
  SELECT round, 'rollout' AS mode, rollouts.prompt_id, reward >= $success AS correct, len(completion_token_ids) AS tokens
  FROM rollouts JOIN rewards USING (run, round, sample_id)
  WHERE $of = 'rollouts' AND reward IS NOT NULL AND round >= $first
), by_prompt AS (
  SELECT round, mode, correct, prompt_id, count(*) AS n, sum(tokens) AS tokens FROM judged GROUP BY ALL
), moved AS (
  SELECT *, (tokens - n * sum(tokens) OVER own / sum(n) OVER own) / sum(n) OVER own AS d
  FROM by_prompt
  WINDOW own AS (PARTITION BY round, mode, correct)
)
SELECT
  round,
  mode,
  if(correct, 'right', 'wrong') AS verdict,
  sum(tokens) / sum(n) AS mean_length,
  CASE WHEN count(*) > 1 THEN sqrt(count(*) / (count(*) - 1) * sum(d * d)) END AS se,
  sum(n) AS n,
  count(*) AS prompts
FROM moved
GROUP BY ALL
ORDER BY round, mode, verdict
