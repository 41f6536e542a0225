-- The experts that each tag favours.
-- share is of the tag's choices in the layer, overall_share of all tags' choices; lift is their ratio
-- (1: the tag uses the expert as everyone does). Few choices make large lifts by chance: min_routed.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $top int = 5: experts per tag
-- $by text = lift: rank by lift or by share
-- $min_routed int = 100: choices by the tag below which an expert does not appear
with by_tag as (
  select l.run, l.tag, l.layer, l.expert, cast(sum(l.routed) as double) as routed
  from load as l
  join moe_layers as m on m.run = l.run and m.layer = l.layer and l.expert < m.experts
  where ($first_step is null or l.step >= $first_step)
    and ($last_step is null or l.step <= $last_step)
    and ($phase is null or l.phase = $phase)
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
  where routed >= $min_routed
)
select
  run, tag, place, layer, expert, cast(routed as bigint) as routed, share, overall_share, lift
from ranked
where place <= $top
order by run, tag, place
