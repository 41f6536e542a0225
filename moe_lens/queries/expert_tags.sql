-- Which tags one expert serves.
-- share is of the expert's choices, overall_share the tag's of all the layer's choices; lift is their
-- ratio (1: the tag uses the expert as everyone does). A tag of the layer has a row, also where it
-- never chose this expert. Null: nobody did.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: the expert's layer
-- $expert int = 0: the expert
with counted as (
  select
    l.run, l.tag,
    cast(sum(l.routed) as double) as everything,
    cast(sum(case when l.expert = $expert then l.routed else 0 end) as double) as routed
  from load_between($first_step, $last_step) as l
  join moe_layers as m on m.run = l.run and m.layer = l.layer and l.expert < m.experts
  where ($phase is null or l.phase = $phase)
    and ($rank is null or l.rank = $rank)
    and l.layer = $layer and $expert >= 0 and $expert < m.experts
  group by l.run, l.tag
),
shares as (
  select
    *,
    routed / nullif(sum(routed) over (partition by run), 0) as share,
    everything / nullif(sum(everything) over (partition by run), 0) as overall_share
  from counted
)
select
  run, tag, cast(routed as bigint) as routed, share, overall_share, share / overall_share as lift
from shares
where everything > 0 and ($tag is null or tag = $tag)
order by run, tag
