-- Time in the all-to-alls of expert parallelism, per layer over time.
-- dispatch_ms sends tokens to their experts' ranks, combine_ms brings the results back: means per
-- forward of those in which they were seen; null: never, and without either there is no row. forwards
-- counts those of the windows in which one was seen. A rank's time includes its waiting for the
-- slowest rank, and without $rank the means are over all ranks: the least of the ranks is the transfer.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $every int = 1 (1 or more): steps per bucket
select
  run, step - step % $every as step, layer,
  cast(sum(forwards) as bigint) as forwards,
  cast(sum(dispatch_ns) as double) / 1e6
    / nullif(cast(sum(case when dispatch_ns is not null then forwards end) as double), 0)
    as dispatch_ms,
  cast(sum(combine_ns) as double) / 1e6
    / nullif(cast(sum(case when combine_ns is not null then forwards end) as double), 0)
    as combine_ms
from layers
where (dispatch_ns is not null or combine_ns is not null)
  and ($first_step is null or step >= $first_step)
  and ($last_step is null or step <= $last_step)
  and ($phase is null or phase = $phase)
  and ($rank is null or rank = $rank)
  and ($first_layer is null or layer >= $first_layer)
  and ($last_layer is null or layer <= $last_layer)
group by run, step - step % $every, layer
order by run, step, layer
