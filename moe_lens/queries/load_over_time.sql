-- Imbalance and drops over time, per layer.
-- max_over_mean is of the bucket's summed counts: wider buckets average out, and are lower. A window
-- of several steps counts at its first.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $every int = 1: steps per bucket
with loads as (
  select
    l.run, l.step - l.step % $every as step, l.layer, l.expert, m.experts,
    cast(sum(l.routed) as double) as routed,
    cast(sum(l.overflowed) as double) as overflowed,
    cast(sum(l.dropped) as double) as dropped
  from load as l
  join moe_layers as m on m.run = l.run and m.layer = l.layer and l.expert < m.experts
  where ($first_step is null or l.step >= $first_step)
    and ($last_step is null or l.step <= $last_step)
    and ($phase is null or l.phase = $phase)
  group by l.run, l.step - l.step % $every, l.layer, l.expert, m.experts
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
