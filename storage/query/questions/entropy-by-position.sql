-- The entropies of student and teacher by position in the completion, nats (in ranges that double).
-- entropy_gap: the mean of |teacher - student|. The student's are null where it did not score (supervise.student: none).
-- $round = last: the round whose rollouts are looked at
SELECT
  (1 << floor(log2(position + 1))::INTEGER) - 1 AS from_position,
  max(position) AS to_position,
  count(*) AS tokens,
  avg(student_entropy) FILTER (isfinite(student_entropy)) AS student_entropy,
  avg(teacher_entropy) FILTER (isfinite(teacher_entropy)) AS teacher_entropy,
  avg(abs(teacher_entropy - student_entropy)) FILTER (isfinite(teacher_entropy - student_entropy)) AS entropy_gap
FROM tokens
WHERE round = $round AND (isfinite(teacher_entropy) OR isfinite(student_entropy))
GROUP BY from_position
ORDER BY from_position
