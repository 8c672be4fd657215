-- Two runs, round by round: the figures of both and the paired difference on the held-out prompts that both have.
-- $other: the run to compare with
-- $metric = reverse_kl | accuracy_greedy | accuracy_sampled | mean_length | clipped_ratio: the figure
SELECT
  round,
  mine.metrics[$metric] AS value,
  theirs.metrics[$metric] AS other_value,
  difference,
  se,
  low,
  high,
  prompts,
  told_apart
FROM differences
JOIN rounds AS mine USING (run, round)
JOIN rounds AS theirs ON theirs.run = other_run AND theirs.round = other_round
WHERE run = $run AND other_run = $other AND round = other_round AND metric = $metric
ORDER BY round
