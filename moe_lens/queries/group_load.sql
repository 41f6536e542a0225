-- Load of each group of experts, per layer whose router chooses among groups first.
-- share: of the layer's choices; over_even: share times groups (1: the fair share). chosen: experts of
-- the group that somebody chose; hottest_share: of the group's choices those of its hottest expert
-- (groups / experts: even). prob_share: what the router's distribution gives the group, where that is
-- known. expert_group counts from 0; its experts are experts / groups neighbours, from first_expert.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
with grouped as (
  select
    m.run, m.layer, m.groups, m.experts, e.expert,
    cast(floor(cast(e.expert as double) * m.groups / m.experts) as bigint) as expert_group
  from moe_layers as m
  join moe_experts as e on e.run = m.run and e.layer = m.layer
  where m.groups > 1 and m.experts % m.groups = 0
    and ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
),
loads as (
  select
    run, layer, expert, cast(sum(routed) as double) as routed,
    case when count(prob_sum) = count(*) then sum(cast(prob_sum as double)) end as prob_sum
  from load_between($first_step, $last_step)
  where ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
  group by run, layer, expert
),
summed as (
  select
    g.run, g.layer, g.expert_group, g.groups,
    min(g.expert) as first_expert, count(*) as experts,
    coalesce(sum(l.routed), 0) as routed, max(l.routed) as hottest,
    sum(case when l.routed > 0 then 1 else 0 end) as chosen,
    -- An expert without a row has neither choices nor probability.
    case when count(l.prob_sum) = count(l.routed) then sum(l.prob_sum) end as prob_sum
  from grouped as g
  left join loads as l on l.run = g.run and l.layer = g.layer and l.expert = g.expert
  group by g.run, g.layer, g.expert_group, g.groups
)
select
  run, layer, expert_group, first_expert, experts,
  cast(routed as bigint) as routed,
  routed / nullif(sum(routed) over (partition by run, layer), 0) as share,
  routed * groups / nullif(sum(routed) over (partition by run, layer), 0) as over_even,
  cast(chosen as bigint) as chosen,
  hottest / nullif(routed, 0) as hottest_share,
  prob_sum / nullif(sum(prob_sum) over (partition by run, layer), 0) as prob_share
from summed
order by run, layer, expert_group
