-- What capture saw and what it lost, per phase.
-- lost_rows: per-token rows lost because the writer fell behind (counts are never lost).
-- fires_expected: MoE blocks entered; fires_seen: those whose routing was seen.
-- breaches: invariants that failed. sampled: forwards whose per-token rows were asked for. Of an
-- imported run lost_rows and fires say nothing: nobody watched its recorder.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $rank int = null: only this rank
select
  run, phase,
  count(distinct step) as steps,
  count(*) as forwards,
  cast(sum(tokens) as bigint) as tokens,
  cast(sum(padding_tokens) as bigint) as padding_tokens,
  cast(sum(case when sampled then 1 else 0 end) as bigint) as sampled,
  cast(sum(lost_rows) as bigint) as lost_rows,
  cast(sum(fires_expected) as bigint) as fires_expected,
  cast(sum(fires_seen) as bigint) as fires_seen,
  cast(sum(breaches) as bigint) as breaches
from steps
where ($first_step is null or step >= $first_step)
  and ($last_step is null or step <= $last_step)
  and ($phase is null or phase = $phase)
  and ($rank is null or rank = $rank)
group by run, phase
order by run, phase
