-- Why tokens may be left out of the loss, in words, and whether this run's training leaves them out.
-- $round = last: the round whose rollouts are looked at
WITH training AS (
  SELECT replace(artifacts.identity ->> '$.config.mask_reasons', '_', ' ') AS leaves_out
  FROM stages JOIN artifacts USING (artifact)
  WHERE stages.stage = 'train' AND stages.round = $round
)
SELECT
  if(reasons = '', 'none', reasons) AS reasons,
  count(*) AS tokens,
  count(*) / sum(count(*)) OVER () AS share,
  count(DISTINCT sample_id) AS completions,
  any_value(list_has_any(string_split(reasons, ', '), leaves_out::VARCHAR[])) AS left_out
FROM tokens LEFT JOIN training ON true
WHERE round = $round AND reasons IS NOT NULL
GROUP BY ALL
ORDER BY tokens DESC
