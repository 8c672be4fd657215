-- Wall time by stage: of the whole run and per round. Stages found in the store cost nothing.
SELECT
  stage,
  count(*) FILTER (state = 'done') AS times,
  count(*) FILTER (state = 'cached') AS cached,
  sum(seconds) AS seconds,
  sum(seconds) / sum(sum(seconds)) OVER () AS share,
  avg(seconds) FILTER (state = 'done') AS seconds_each,
  max(seconds) AS longest
FROM stages
GROUP BY stage
ORDER BY seconds DESC
