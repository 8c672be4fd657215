-- The teacher's probability of the stored list of tokens, by position in the completion (in ranges that double).
-- $round = last: the round whose rollouts are looked at
SELECT
  (1 << floor(log2(position + 1))::INTEGER) - 1 AS from_position,
  max(position) AS to_position,
  count(*) AS tokens,
  avg(teacher_mass) AS mean_mass,
  approx_quantile(teacher_mass, 0.05) AS lowest_twentieth,
  min(teacher_mass) AS least,
  count(*) FILTER (teacher_mass < 0.9) / count(*) AS share_below_90_percent
FROM tokens
WHERE round = $round AND teacher_mass IS NOT NULL
GROUP BY from_position
ORDER BY from_position
