-- Load of each expert, per layer: choices the router made of it, and what became of them.
-- share is of the layer's choices (they sum to 1 over experts); ratio is over the mean expert
-- (1: fair share; at most E/k). Experts that nobody chose have a row of zeros. Zero-compute experts
-- (ids from `experts` upward) are left out.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
with wanted as (
  select run, layer, unnest(range(experts)) as expert, experts
  from moe_layers
  where ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
),
counted as (
  select
    run, layer, expert,
    sum(routed) as routed, sum(processed) as processed, sum(overflowed) as overflowed,
    sum(dropped) as dropped, sum(rerouted_in) as rerouted_in, sum(padding) as padding,
    sum(cast(prob_sum as double)) as prob_sum, sum(cast(weight_sum as double)) as weight_sum
  from load_between($first_step, $last_step)
  where ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, layer, expert
),
filled as (
  select
    w.run, w.layer, w.expert, w.experts,
    coalesce(cast(c.routed as bigint), 0) as routed,
    coalesce(cast(c.processed as bigint), 0) as processed,
    coalesce(cast(c.overflowed as bigint), 0) as overflowed,
    coalesce(cast(c.dropped as bigint), 0) as dropped,
    coalesce(cast(c.rerouted_in as bigint), 0) as rerouted_in,
    coalesce(cast(c.padding as bigint), 0) as padding,
    c.prob_sum, c.weight_sum
  from wanted as w
  left join counted as c on c.run = w.run and c.layer = w.layer and c.expert = w.expert
),
shared as (
  select
    *,
    cast(routed as double)
      / nullif(cast(sum(routed) over (partition by run, layer) as double), 0) as share
  from filled
)
select
  run, layer, expert, routed, processed, overflowed, dropped, rerouted_in, padding,
  prob_sum, weight_sum, share, share * experts as ratio
from shared
order by run, layer, expert
