-- Held-out prompts that got worse between two evaluated rounds: fewer right answers, or a higher KL to the teacher.
-- $before = first_evaluated: the earlier round
-- $after = last_evaluated: the later round
-- $limit = 20: rows
WITH scores AS (
  SELECT
    round,
    prompt_id,
    avg(correct::INTEGER) AS correct,
    sum(reverse_kl_sum) FILTER (mode = 'kl') / sum(tokens) FILTER (mode = 'kl') AS kl,
    any_value(completion_text ORDER BY mode, sample_index) AS answer
  FROM evaluations
  WHERE round IN ($before, $after)
  GROUP BY ALL
)
SELECT
  prompt_id,
  old.correct AS correct_before,
  new.correct AS correct_after,
  old.kl AS kl_before,
  new.kl AS kl_after,
  new.kl - old.kl AS kl_change,
  text AS prompt,
  old.answer AS answer_before,
  new.answer AS answer_after
FROM scores AS old JOIN scores AS new USING (prompt_id) JOIN prompts USING (prompt_id)
WHERE old.round = $before AND new.round = $after AND (new.correct < old.correct OR new.kl > old.kl)
ORDER BY new.correct - old.correct NULLS LAST, kl_change DESC
LIMIT $limit
