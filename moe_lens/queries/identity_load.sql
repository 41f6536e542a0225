-- Load of each expert whatever the layer: layers that run the same weights are summed.
-- identity: names weights (moe_experts); an expert that is its layer's own is `layer/expert`. layers:
-- that can choose it; places: expert ids that stand for it, in all of them. even: what it would get
-- if every layer's router were even, and over_even = routed / even (1: its fair share); share: of all
-- choices of the run. shared: the sum is over several places.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $shared_only bool = false: only identities that stand in several places
with loads as (
  select run, layer, expert, cast(sum(routed) as double) as routed
  from load_between($first_step, $last_step)
  where ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, layer, expert
),
placed as (
  select
    e.run, e.layer, e.expert, e.identity, coalesce(l.routed, 0) as routed,
    avg(coalesce(l.routed, 0)) over (partition by e.run, e.layer) as even
  from moe_experts as e
  left join loads as l on l.run = e.run and l.layer = e.layer and l.expert = e.expert
  where ($first_layer is null or e.layer >= $first_layer)
    and ($last_layer is null or e.layer <= $last_layer)
),
summed as (
  select
    run, identity, min(layer) as first_layer, min(expert) as first_expert,
    count(distinct layer) as layers, count(*) as places,
    sum(routed) as routed, sum(even) as even
  from placed
  group by run, identity
),
whole as (
  select *, sum(routed) over (partition by run) as assignments
  from summed
)
select
  run, identity, first_layer, layers, places, places > 1 as shared,
  cast(routed as bigint) as routed, even,
  routed / nullif(even, 0) as over_even,
  routed / nullif(assignments, 0) as share
from whole
where not $shared_only or places > 1
order by run, first_layer, first_expert, identity
