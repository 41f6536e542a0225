-- Forwards and how fast they were, over time and by phase.
-- host_ms: mean wall time of a forward on the host. tokens_per_second: of one rank, while it is in its
-- forwards (valid tokens over their wall time). lost_rows: per-token rows lost because the writer fell
-- behind. breaches: invariants that failed.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $rank int = null: only this rank
-- $every int = 1 (1 or more): steps per bucket
select
  run, step - step % $every as step, phase,
  count(*) as forwards,
  cast(sum(tokens) as bigint) as tokens,
  cast(sum(host_ns) as double) / nullif(count(host_ns), 0) / 1e6 as host_ms,
  cast(sum(case when host_ns is not null then tokens end) as double)
    / nullif(cast(sum(host_ns) as double), 0) * 1e9 as tokens_per_second,
  cast(sum(lost_rows) as bigint) as lost_rows,
  cast(sum(breaches) as bigint) as breaches
from steps
where ($first_step is null or step >= $first_step)
  and ($last_step is null or step <= $last_step)
  and ($phase is null or phase = $phase)
  and ($rank is null or rank = $rank)
group by run, step - step % $every, phase
order by run, step, phase
