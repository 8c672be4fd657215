-- What a run keeps on disk, by kind of artifact: files, their size, and bytes per token of all its rollouts.
WITH used AS (
  SELECT DISTINCT stage, artifact FROM (
    SELECT unnest(map_keys(artifacts)) AS stage, unnest(map_values(artifacts)) AS artifact FROM stages
  )
)
SELECT
  artifacts.stage AS kind,
  count(*) AS artifacts,
  count(artifacts.evicted) AS evicted,
  sum(artifacts.bytes) AS bytes,
  sum(artifacts.bytes) / (SELECT sum(rollout_tokens) FROM rounds) AS bytes_per_token
FROM used JOIN artifacts USING (stage, artifact)
GROUP BY kind
ORDER BY bytes DESC
