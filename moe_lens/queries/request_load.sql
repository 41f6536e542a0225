-- Which experts one sequence was routed to, per layer.
-- chosen: how many of its tokens chose the expert in the layer; experts that none chose have no row.
-- Padding, rejected drafts and zero-compute experts are left out.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $rank int = 0: the sequence's rank
-- $sequence int = 0: which sequence
with valid as (
  select t.run, t.attempt, t.step, t.forward, t.stream, t.token
  from tokens as t
  where t.rank = $rank
    and t.sequence = $sequence
    and not t.padding
    and ($first_step is null or t.step >= $first_step)
    and ($last_step is null or t.step <= $last_step)
    and ($tag is null or t.tag = $tag)
    and (
      $phase is null
      or exists (
        select 1 from steps as f
        where f.run = t.run and f.rank = t.rank and f.step = t.step and f.forward = t.forward
          and f.phase = $phase
      )
    )
    and not exists (
      select 1 from outcomes as o
      where o.run = t.run and o.rank = t.rank and o.step = t.step and o.forward = t.forward
        and o.sequence = t.sequence and o.position = t.position and not o.kept
        and t.stream <> 'encoder'
    )
),
choices as (
  select r.run, r.layer, m.experts, unnest(r.expert_ids) as expert
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  join valid as v
    on v.run = r.run and v.attempt = r.attempt and v.step = r.step and v.forward = r.forward
    and v.token = r.token and v.stream = m.stream
  where r.rank = $rank
    and ($first_layer is null or r.layer >= $first_layer)
    and ($last_layer is null or r.layer <= $last_layer)
    and ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
)
select run, layer, expert, count(*) as chosen
from choices
where expert < experts
group by run, layer, expert
order by run, layer, expert
