-- The tokens that the teacher finds least likely, compared with the student, and the text around them.
-- Where the student did not score (supervise.student: none) it is the distribution sampled from.
-- Their place in the text is looked up last, for the rows that are shown.
-- $round = last: the round whose rollouts are looked at
-- $limit = 20: rows
WITH worst AS (
  SELECT run, round, sample_id, position, token, gap, teacher_logprob, reasons,
    coalesce(student_logprob, sampling_logprob) AS student_logprob
  FROM tokens
  WHERE round = $round AND isfinite(gap)
  ORDER BY gap DESC, run, sample_id, position
  LIMIT $limit
), placed AS (
  SELECT *, places(run, completion_token_ids, completion_text) AS place
  FROM rollouts JOIN worst USING (run, round, sample_id)
)
SELECT
  gap,
  right(left(completion_text, place.start[position + 1]), 40) AS before,
  token,
  substr(completion_text, place.start[position + 1] + place.length[position + 1] + 1, 40) AS after,
  exp(student_logprob) AS student_p,
  exp(teacher_logprob) AS teacher_p,
  reasons,
  position,
  sample_id
FROM placed
ORDER BY gap DESC, run, sample_id, position
