-- What the routing of a layer costs on real kernels: replayed, beside its balanced twin and the floor.
-- A row is (result, phase, layer); percentiles are over the replayed forwards of the trace: a p90 takes 10
-- of them and a p99 takes 100, and is null below, where it would be the slowest (max_ms). over_balanced
-- is the sum of times over that of the balanced twin (as many rows, over all experts), over_same_touched
-- over that of the twin that touches the same experts, over_floor over the floors; noise: by how much two
-- timings of the same work differ, as a share: a ratio that is nearer to 1 says nothing. touched: experts
-- that computed something, median; rows_max: most rows of one expert. Written by moe-lens replay.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $result text = null: only this result; null: all
select
  run, result, phase, layer,
  count(*) as forwards,
  cast(sum(tokens) as bigint) as tokens,
  quantile_cont(time_ns, 0.5) / 1e6 as p50_ms,
  case when count(*) >= 10 then quantile_cont(time_ns, 0.9) / 1e6 end as p90_ms,
  case when count(*) >= 100 then quantile_cont(time_ns, 0.99) / 1e6 end as p99_ms,
  max(time_ns) / 1e6 as max_ms,
  quantile_cont(floor_ns, 0.5) / 1e6 as floor_ms,
  quantile_cont(balanced_ns, 0.5) / 1e6 as balanced_ms,
  quantile_cont(same_touched_ns, 0.5) / 1e6 as same_touched_ms,
  sum(time_ns) / nullif(sum(floor_ns), 0) as over_floor,
  sum(time_ns) / nullif(sum(balanced_ns), 0) as over_balanced,
  sum(time_ns) / nullif(sum(same_touched_ns), 0) as over_same_touched,
  greatest(abs(sum(again_ns - time_ns)), sqrt(sum(noise_ns * noise_ns))) / sum(time_ns) as noise,
  quantile_cont(touched, 0.5) as touched,
  max(rows_max) as rows_max,
  cast(sum(dropped) as double) / nullif(sum(slots), 0) as dropped_share,
  cast(sum(rerouted) as double) / nullif(sum(slots), 0) as rerouted_share,
  1e9 * sum(flop) / sum(time_ns) as flop_per_s,
  1e9 * sum(bytes) / sum(time_ns) as bytes_per_s
from replay
where ($result is null or result = $result)
  and ($first_step is null or step >= $first_step)
  and ($last_step is null or step <= $last_step)
  and ($phase is null or phase = $phase)
  and ($rank is null or rank = $rank)
  and ($first_layer is null or layer >= $first_layer)
  and ($last_layer is null or layer <= $last_layer)
group by run, result, phase, layer
order by run, result, phase, layer
