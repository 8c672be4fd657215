-- The groups of a round: each prompt's rewards, those without signal (all equal) first, then by their mean.
-- $round = last: the round whose rollouts are looked at
-- $success = 0.5: reward from which a completion counts as correct
-- $limit = 50: rows
-- A sample whose judge failed (n_failed) has no reward and is left out.
SELECT
  groups.prompt_id,
  n,
  n_failed,
  mean,
  std,
  all_equal,
  avg((reward >= $success)::INTEGER) AS success_rate,
  any_value(feedback ORDER BY reward, sample_index) AS feedback_of_worst,
  any_value(failed) AS why_failed
FROM groups JOIN rewards USING (run, round, prompt_id)
WHERE round = $round
GROUP BY ALL
ORDER BY all_equal DESC, mean NULLS LAST, groups.prompt_id
LIMIT $limit
