-- Where the greedy answers of two students to the same held-out prompt part: the first token that differs.
-- $other: the run to compare with; it can be the same
-- $round = last_evaluated: the round
-- $other_round = last_evaluated: the round of the other run
-- $limit = 20: rows
WITH pairs AS (
  SELECT
    prompt_id,
    one.completion_token_ids AS ids,
    other.completion_token_ids AS other_ids,
    one.completion_text AS answer,
    other.completion_text AS other_answer,
    one.correct AS correct,
    other.correct AS other_correct
  FROM evaluations AS one JOIN evaluations AS other USING (prompt_id, mode, sample_index)
  WHERE mode = 'greedy' AND one.run = $run AND one.round = $round AND other.run = $other AND other.round = $other_round
), parted AS (
  SELECT *, list_position([ids[i] IS DISTINCT FROM other_ids[i] FOR i IN range(1, len(ids) + 2)], true) AS place
  FROM pairs
  WHERE ids <> other_ids
), words AS (
  SELECT run, id, any_value(CASE WHEN text IS NULL THEN part_name(token) ELSE text END) AS token
  FROM vocabulary
  WHERE tokenizer = 'student'
  GROUP BY ALL
)
SELECT
  prompt_id,
  place - 1 AS position,
  mine.token AS token,
  theirs.token AS other_token,
  answer,
  other_answer,
  correct,
  other_correct
FROM parted
LEFT JOIN words AS mine ON mine.run = $run AND mine.id = ids[place]
LEFT JOIN words AS theirs ON theirs.run = $other AND theirs.id = other_ids[place]
ORDER BY position, prompt_id
LIMIT $limit
