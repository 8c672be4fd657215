-- How far the likeliest tokens of student and teacher overlap at the tokens of a round's rollouts (Rethinking OPD, 2604.13016).
-- Both stored lists are cut to the shorter, k. overlap_ratio: the share of k that is in both; student_mass and teacher_mass: the
-- probability of what is in both; advantage: the mean over these of p (log q - log p), p and q renormalised on them: 0 where the
-- teacher weights them as the student does, negative where the student is too sure. Null where a list is not stored (not_stored);
-- trained_overlap_ratio is that of the live student, the mean over the round's optimizer steps, where the objective computes it.
-- unfinished: the stage that the round has not finished, supervise or train; what comes of it, or of a later one, is null.
-- $round = last: the round whose rollouts are looked at
-- $by = round | position: one row, or one per range of positions in the completion (ranges that double)
WITH made AS (
  SELECT
    coalesce(bool_or(stage = 'train'), false)
      AND coalesce(bool_and(state IN ('done', 'cached')) FILTER (stage LIKE 'supervise%'), true) AS is_scored,
    coalesce(bool_or(stage = 'train' AND state IN ('done', 'cached')), false) AS is_trained
  FROM stages
  WHERE run = $run AND round = $round
), lists AS (
  SELECT student_topk_ids AS s, student_topk_student_logprobs AS p, student_topk_teacher_logprobs AS q, teacher_topk_ids AS t
  FROM supervision, made
  WHERE round = $round AND is_scored
), stored AS (
  SELECT concat_ws(', ', CASE WHEN count(s) = 0 THEN 'student_topk' END, CASE WHEN count(t) = 0 THEN 'teacher_topk' END) AS missing
  FROM lists
), tokens_ AS (
  SELECT unnest(s) AS s, unnest(p) AS p, unnest(q) AS q, unnest(t) AS t, generate_subscripts(s, 1) - 1 AS position
  FROM lists
  WHERE s IS NOT NULL AND t IS NOT NULL
), cut AS (
  SELECT position, least(len(s), len(t)) AS k, list_zip(s, p, q)[1:least(len(s), len(t))] AS s, t[1:least(len(s), len(t))] AS t
  FROM tokens_
), shared AS (
  SELECT position, k, [e FOR e IN s IF list_contains(t, e[1]) AND isfinite(e[2]) AND isfinite(e[3])] AS common
  FROM cut
  WHERE k > 0
), measured AS (
  SELECT
    position,
    k,
    len(common) AS n,
    coalesce(list_sum([exp(e[2]) FOR e IN common]), 0) AS p,
    coalesce(list_sum([exp(e[3]) FOR e IN common]), 0) AS q,
    list_sum([exp(e[2]) * (e[3] - e[2]) FOR e IN common]) AS pull
  FROM shared
), found AS (
  SELECT
    CASE $by WHEN 'position' THEN (1 << floor(log2(position + 1))::INTEGER) - 1 END AS from_position,
    max(position) AS to_position,
    count(*) AS tokens,
    avg(k) AS k,
    avg(n / k) AS overlap_ratio,
    avg(p) AS student_mass,
    avg(q) AS teacher_mass,
    avg((pull / p + ln(p) - ln(q)) / n) FILTER (p > 0 AND q > 0) AS advantage
  FROM measured
  GROUP BY from_position
), trained AS (
  SELECT sum(overlap_ratio * tokens) / sum(tokens) AS trained_overlap_ratio
  FROM training_steps, made
  WHERE round = $round AND stage = 'train' AND is_scored AND is_trained AND overlap_ratio IS NOT NULL
)
SELECT
  from_position,
  to_position,
  tokens,
  k,
  overlap_ratio,
  student_mass,
  teacher_mass,
  advantage,
  trained_overlap_ratio,
  if(is_scored AND missing != '', missing, NULL) AS not_stored,
  CASE WHEN NOT is_scored THEN 'supervise' WHEN NOT is_trained THEN 'train' END AS unfinished
FROM made, stored LEFT JOIN found ON true LEFT JOIN trained ON true
ORDER BY from_position
