-- What the ranks of an expert-parallel group have to do, and how long they wait for the slowest.
-- A row is (result, placement, phase, layer). rows_mean: of a rank in a forward; rows_slowest: of the rank
-- with most, mean over forwards; max_over_mean_rows and max_over_mean_time: that rank's, and the slowest
-- rank's time, over the mean rank's, sums over forwards (null where nothing was computed).
-- share_p50, share_p95, share_p99: the share of a forward's rows that the rank with most has,
-- percentiles over forwards (even: 1 / ranks); a p95 takes 20 of them and a p99 takes 100.
-- waiting_share: of the time of all ranks, what they wait for the slowest. layer_ms: dispatch, the slowest
-- rank and combine, mean over forwards; mode says whether ranks were simulated or real.
-- Written by moe-lens replay --ep.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $result text = null: only this result; null: all
-- $placement text = null: only this placement; null: all
with forwards as (
  select
    run, result, placement, phase, layer, step, forward,
    max(mode) as mode,
    max(ep_ranks) as ranks,
    sum(rows) as rows_sum,
    max(rows) as rows_max,
    sum(busy_ns) as busy_sum,
    max(busy_ns) as busy_max,
    sum(wait_ns) as wait_sum,
    max(dispatch_ns) as dispatch_ns,
    max(combine_ns) as combine_ns,
    sum(sent_bytes) as sent_bytes
  from replay_ep
  where ($result is null or result = $result)
    and ($placement is null or placement = $placement)
    and ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($phase is null or phase = $phase)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, result, placement, phase, layer, step, forward
),
shared as (
  select *, cast(rows_max as double) / nullif(rows_sum, 0) as share from forwards
)
select
  run, result, placement, phase, layer,
  max(mode) as mode,
  max(ranks) as ranks,
  count(*) as forwards,
  sum(rows_sum) / sum(cast(ranks as double)) as rows_mean,
  avg(rows_max) as rows_slowest,
  sum(rows_max) / nullif(sum(cast(rows_sum as double) / ranks), 0) as max_over_mean_rows,
  sum(busy_max) / nullif(sum(busy_sum / ranks), 0) as max_over_mean_time,
  quantile_cont(share, 0.5) as share_p50,
  case when count(*) >= 20 then quantile_cont(share, 0.95) end as share_p95,
  case when count(*) >= 100 then quantile_cont(share, 0.99) end as share_p99,
  sum(wait_sum) / nullif(sum(ranks * busy_max), 0) as waiting_share,
  avg(dispatch_ns) / 1e6 as dispatch_ms,
  avg(busy_max) / 1e6 as slowest_ms,
  avg(combine_ns) / 1e6 as combine_ms,
  avg(dispatch_ns + busy_max + combine_ns) / 1e6 as layer_ms,
  cast(sum(sent_bytes) as double) / sum(ranks) as sent_bytes_mean
from shared
group by run, result, placement, phase, layer
order by run, result, placement, phase, layer
