-- The experts that each tag favours.
-- share is of the tag's choices in the layer, overall_share of all tags' choices; lift is their ratio
-- (1: the tag uses the expert as everyone does). Few choices make large lifts by chance: min_routed.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $top int = 5 (1 or more): experts per tag
-- $by text = lift (lift or share): what to rank by
-- $min_routed int = 100: choices by the tag below which an expert does not appear
with by_tag as (
  select l.run, l.tag, l.layer, l.expert, cast(sum(l.routed) as double) as routed
  from load_between($first_step, $last_step) as l
  join moe_layers as m on m.run = l.run and m.layer = l.layer and l.expert < m.experts
  where ($phase is null or l.phase = $phase)
    and ($rank is null or l.rank = $rank)
    and ($first_layer is null or l.layer >= $first_layer)
    and ($last_layer is null or l.layer <= $last_layer)
  group by l.run, l.tag, l.layer, l.expert
),
shares as (
  select
    *,
    routed / nullif(sum(routed) over (partition by run, tag, layer), 0) as share,
    sum(routed) over (partition by run, layer, expert)
      / nullif(sum(routed) over (partition by run, layer), 0) as overall_share
  from by_tag
),
lifted as (
  select *, share / overall_share as lift from shares where routed > 0
),
ranked as (
  select
    *,
    row_number() over (
      partition by run, tag
      order by case when $by = 'share' then share else lift end desc, layer, expert
    ) as place
  from lifted
  where routed >= $min_routed and ($tag is null or tag = $tag)
)
select
  run, tag, place, layer, expert, cast(routed as bigint) as routed, share, overall_share, lift
from ranked
where place <= $top
order by run, tag, place
