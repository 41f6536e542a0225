-- Imbalance and drops over time, per layer.
-- max_over_mean is of the bucket's summed counts: wider buckets average out, and are lower. A window
-- of several steps counts at its first, and so does a run of up to 64 windows where $every is 64 or more
-- and no steps are asked for: long runs are then summed from load_coarse.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $every int = 1 (1 or more): steps per bucket
with loads as (
  select
    l.run, l.step, l.layer, l.expert, m.experts,
    cast(sum(l.routed) as double) as routed,
    cast(sum(l.overflowed) as double) as overflowed,
    cast(sum(l.dropped) as double) as dropped
  from load_by_step($first_step, $last_step, $every) as l
  join moe_layers as m on m.run = l.run and m.layer = l.layer and l.expert < m.experts
  where ($phase is null or l.phase = $phase)
    and ($tag is null or l.tag = $tag)
    and ($rank is null or l.rank = $rank)
    and ($first_layer is null or l.layer >= $first_layer)
    and ($last_layer is null or l.layer <= $last_layer)
  group by l.run, l.step, l.layer, l.expert, m.experts
)
select
  run, step, layer,
  cast(sum(routed) as bigint) as assignments,
  max(routed) * experts / nullif(sum(routed), 0) as max_over_mean,
  sum(overflowed) / nullif(sum(routed), 0) as overflow_rate,
  sum(dropped) / nullif(sum(routed), 0) as dropped_rate
from loads
group by run, step, layer, experts
order by run, step, layer
