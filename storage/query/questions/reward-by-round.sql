-- The rewards of every round: their mean with its error, and how many groups (prompts) are right, wrong or mixed.
-- Of a group all judged samples count: all_right and all_wrong have no sample on the other side of $success, mixed has both.
-- without_signal: no two rewards differ, so that no advantage is left. routed: share of the samples that the divergence counts for.
-- $success = 0.5: reward from which a completion counts as right
WITH by_prompt AS (
  SELECT
    round,
    prompt_id,
    count(reward) AS n,
    count(*) - count(reward) AS failed,
    sum(reward) AS reward,
    count(*) FILTER (reward >= $success) AS correct,
    coalesce(min(reward) = max(reward), true) AS all_equal
  FROM rewards
  GROUP BY ALL
), moved AS (
  SELECT *, (reward - n * sum(reward) OVER own / sum(n) OVER own) / sum(n) OVER own AS d
  FROM by_prompt
  WINDOW own AS (PARTITION BY round)
), counted AS (
  SELECT
    round,
    sum(reward) / sum(n) AS reward,
    CASE WHEN count(d) > 1 THEN sqrt(count(d) / (count(d) - 1) * sum(d * d)) END AS se,
    sum(n) AS n,
    sum(failed) AS failed,
    sum(correct) / sum(n) AS success_rate,
    count(*) AS groups,
    count(*) FILTER (n > 0 AND correct = n) AS all_right,
    count(*) FILTER (n > 0 AND correct = 0) AS all_wrong,
    count(*) FILTER (correct > 0 AND correct < n) AS mixed,
    count(*) FILTER (all_equal) AS without_signal
  FROM moved
  GROUP BY round
)
SELECT counted.*, rounds.metrics['train_routed_samples'] AS routed
FROM counted JOIN rounds USING (round)
ORDER BY round
