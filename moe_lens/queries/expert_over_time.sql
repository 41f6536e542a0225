-- Load of one expert over time.
-- share is of the layer's choices, ratio over the mean expert (1: fair share); both are of the
-- bucket's summed counts. overflowed: its choices that found it full; dropped: those that no expert
-- computed. A bucket in which the layer made choices has a row, also where none was of this expert.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: the expert's layer
-- $expert int = 0: the expert
-- $every int = 1 (1 or more): steps per bucket
with counted as (
  select
    l.run, l.step, m.experts,
    cast(sum(l.routed) as double) as everything,
    sum(case when l.expert = $expert then l.routed else 0 end) as routed,
    sum(case when l.expert = $expert then l.overflowed else 0 end) as overflowed,
    sum(case when l.expert = $expert then l.dropped else 0 end) as dropped
  from load_by_step($first_step, $last_step, $every) as l
  join moe_layers as m on m.run = l.run and m.layer = l.layer and l.expert < m.experts
  where ($phase is null or l.phase = $phase)
    and ($tag is null or l.tag = $tag)
    and ($rank is null or l.rank = $rank)
    and l.layer = $layer and $expert >= 0 and $expert < m.experts
  group by l.run, l.step, m.experts
)
select
  run, step, cast(routed as bigint) as routed,
  cast(routed as double) / everything as share,
  cast(routed as double) / everything * experts as ratio,
  cast(overflowed as bigint) as overflowed,
  cast(dropped as bigint) as dropped
from counted
where everything > 0
order by run, step
