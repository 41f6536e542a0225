-- Counts of every expert over time, per layer: what a change of the routing is looked for in.
-- routed: the router's choices by valid tokens, in the bucket; experts without any have no row there. A
-- window of several steps counts at its first, and so does a run of up to 64 windows where $every is 64
-- or more and no steps are asked for. Zero-compute experts (ids from `experts` upward) are left out.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $every int = 1 (1 or more): steps per bucket
select l.run, l.step, l.layer, l.expert, cast(sum(l.routed) as bigint) as routed
from load_by_step($first_step, $last_step, $every) as l
join moe_layers as m on m.run = l.run and m.layer = l.layer and l.expert < m.experts
where l.routed > 0
  and ($phase is null or l.phase = $phase)
  and ($tag is null or l.tag = $tag)
  and ($rank is null or l.rank = $rank)
  and ($first_layer is null or l.layer >= $first_layer)
  and ($last_layer is null or l.layer <= $last_layer)
group by l.run, l.step, l.layer, l.expert
order by l.run, l.step, l.layer, l.expert
