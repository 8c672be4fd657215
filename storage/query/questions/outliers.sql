-- Tokens outside the trust region: those to which the teacher gives less probability than the student.
-- outside is 1 - min(teacher's probability / student's, 1), the share that TrOPD does not trust; far: a gap above $nats.
-- What a training really left out is in training_steps.outlier_fraction.
-- $by = token | length | truncation | position: what to group by; lengths and positions in ranges that double
-- $round = last: the round whose rollouts are looked at
-- $nats = 2.0: the gap from which a token counts as far outside
-- $limit = 20: rows
WITH grouped AS (
  SELECT
    CASE $by
      WHEN 'token' THEN token
      WHEN 'length' THEN (1 << floor(log2(len(completion_token_ids)))::INTEGER) || ' tokens and more'
      WHEN 'truncation' THEN if(finish_reason = 'length', 'cut off at the length limit', 'ended by itself')
      WHEN 'position' THEN (1 << floor(log2(position + 1))::INTEGER) - 1 || ' and more'
    END AS "group",
    1 - least(exp(-gap), 1) AS outside,
    gap
  FROM tokens JOIN rollouts USING (run, round, sample_id)
  WHERE round = $round AND isfinite(gap)
)
SELECT
  "group",
  count(*) AS tokens,
  avg(outside) AS outside,
  sum(outside) / sum(sum(outside)) OVER () AS share_of_all_outside,
  count(*) FILTER (gap > $nats) / count(*) AS far,
  max(gap) AS largest_gap
FROM grouped
GROUP BY "group"
ORDER BY share_of_all_outside DESC
LIMIT $limit
