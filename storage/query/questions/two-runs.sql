-- Two runs, round by round: the figures of both and the paired difference, the other minus this one, on the prompts that both have.
-- $other: the run to compare with
-- $metric = reverse_kl | accuracy_greedy | accuracy_sampled | mean_length | clipped_ratio: the figure
SELECT
  round,
  mine.metrics[$metric] AS value,
  theirs.metrics[$metric] AS other_value,
  difference AS other_minus_value,
  se,
  low,
  high,
  prompts,
  told_apart
FROM differences
JOIN rounds AS theirs USING (run, round)
JOIN rounds AS mine ON mine.run = other_run AND mine.round = other_round
WHERE run = $other AND other_run = $run AND round = other_round AND metric = $metric
ORDER BY round
