-- The layers x experts heat map: the router's choices of each expert by valid tokens.
-- share and ratio as in expert_load, of which this is the quick part: it reads one column of counts.
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
  select run, layer, expert, sum(routed) as routed
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
    w.run, w.layer, w.expert, w.experts, coalesce(cast(c.routed as bigint), 0) as routed
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
select run, layer, expert, routed, share, share * experts as ratio
from shared
order by run, layer, expert
