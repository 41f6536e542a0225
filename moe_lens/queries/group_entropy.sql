-- Entropy of routers that choose among groups of experts first, by the chain rule, per layer.
-- H(e) = H(g) + H(e|g): what is open of the expert is what is open of its group, and of the expert
-- inside the group; all in nats. token_*: mean over valid tokens with finite logits, of the router's
-- full distribution, in which a group has the sum of its experts. load_*: of the shares of the
-- choices made. Neighbouring experts are a group: experts / groups of them. Only layers with groups
-- (moe_layers.groups); token_* are null where the router has no such distribution, token_group and
-- token_within also where the trace was written before they were recorded.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
with grouped as (
  select run, layer, experts, groups, top_groups
  from moe_layers
  where groups > 1 and experts % groups = 0
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
),
finite as (
  select
    run, layer, cast(tokens - nonfinite_tokens as double) as tokens,
    cast(entropy_sum as double) as entropy_sum,
    cast(group_entropy_sum as double) as group_entropy_sum
  from routers
  where ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
),
by_token as (
  select
    run, layer,
    cast(sum(tokens) as bigint) as tokens,
    sum(entropy_sum) / nullif(sum(case when entropy_sum is not null then tokens end), 0)
      as token_entropy,
    sum(group_entropy_sum)
      / nullif(sum(case when group_entropy_sum is not null then tokens end), 0) as token_group,
    -- Of the same windows both, which those of an older version are not.
    sum(case when group_entropy_sum is not null then entropy_sum - group_entropy_sum end)
      / nullif(sum(case when group_entropy_sum is not null then tokens end), 0) as token_within
  from finite
  group by run, layer
),
loads as (
  select
    l.run, l.layer, l.expert,
    floor(cast(l.expert as double) * g.groups / g.experts) as place,
    cast(sum(l.routed) as double) as routed
  from load_between($first_step, $last_step) as l
  join grouped as g on g.run = l.run and g.layer = l.layer and l.expert < g.experts
  where ($phase is null or l.phase = $phase)
    and ($tag is null or l.tag = $tag)
    and ($rank is null or l.rank = $rank)
  group by l.run, l.layer, l.expert, g.groups, g.experts
  having sum(l.routed) > 0
),
shares as (
  select
    run, layer, place,
    routed / sum(routed) over (partition by run, layer) as share,
    sum(routed) over (partition by run, layer, place) / sum(routed) over (partition by run, layer)
      as group_share
  from loads
),
by_load as (
  select
    run, layer,
    -sum(share * ln(share)) as load_entropy,
    -sum(share * ln(group_share)) as load_group,
    -sum(share * ln(share / group_share)) as load_within
  from shares
  group by run, layer
)
select
  g.run, g.layer, g.experts, g.groups, g.top_groups, coalesce(t.tokens, 0) as tokens,
  t.token_entropy, t.token_group, t.token_within,
  l.load_entropy, l.load_group, l.load_within
from grouped as g
left join by_token as t on t.run = g.run and t.layer = g.layer
left join by_load as l on l.run = g.run and l.layer = g.layer
order by g.run, g.layer
