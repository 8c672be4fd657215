-- What a checkpoint was trained on: every round up to its own, and the warm-up.
-- $round = last: the round that ended with the checkpoint
WITH steps AS (
  SELECT round, stage, count(*) AS steps, sum(samples) AS samples, sum(tokens) AS tokens_in_loss
  FROM training_steps
  WHERE stage IN ('train', 'warmup') AND round <= $round
  GROUP BY ALL
), first_seen AS (
  SELECT prompt_id, min(round) AS round FROM rollouts WHERE round <= $round GROUP BY prompt_id
), written AS (
  SELECT
    round,
    count(DISTINCT prompt_id) AS prompts,
    count(*) AS completions,
    sum(len(completion_token_ids)) AS tokens_written,
    string_agg(DISTINCT behaviour, ', ' ORDER BY behaviour) AS written_by,
    any_value(artifact) AS rollouts
  FROM rollouts
  WHERE round <= $round
  GROUP BY round
)
SELECT
  round,
  stage,
  written_by,
  prompts,
  (SELECT count(*) FROM first_seen WHERE first_seen.round = steps.round AND stage = 'train') AS new_prompts,
  completions,
  tokens_written,
  tokens_in_loss,
  steps,
  samples / steps AS samples_per_step,
  rollouts,
  left(student_sha256, 16) AS student
FROM steps LEFT JOIN written USING (round) LEFT JOIN rounds USING (round)
ORDER BY round
