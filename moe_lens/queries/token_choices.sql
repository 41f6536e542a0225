-- What the router of a layer said of single tokens, and what became of it: a row a token.
-- expert_ids, weights: as the experts received them; router_ids: the router's own choices, where others
-- ran (moe_layers.faithful), else null; dropped: slots that no expert computed, null where none;
-- logits: where they were recorded, in bfloat16. From kept rows; padding and rejected drafts are left
-- out. Where there are more than `most` tokens: whole forwards, drawn evenly, until they hold about so
-- many.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: which layer
-- $most int = 4096: tokens to look at; null: all
with rejected as (
  select distinct run, rank, step, forward, sequence, position
  from outcomes
  where not kept
),
valid as (
  select t.run, t.rank, t.attempt, t.step, t.forward, t.token, t.sequence, t.position
  from tokens as t
  join moe_layers as m on m.run = t.run and m.stream = t.stream
  left join rejected as o
    on o.run = t.run and o.rank = t.rank and o.step = t.step and o.forward = t.forward
    and o.sequence = t.sequence and o.position = t.position and t.stream <> 'encoder'
  where m.layer = $layer
    and not t.padding
    and o.run is null
    and ($first_step is null or t.step >= $first_step)
    and ($last_step is null or t.step <= $last_step)
    and ($tag is null or t.tag = $tag)
    and ($rank is null or t.rank = $rank)
    and (
      $phase is null
      or exists (
        select 1 from steps as f
        where f.run = t.run and f.rank = t.rank and f.step = t.step and f.forward = t.forward
          and f.phase = $phase
      )
    )
),
sized as (
  select
    run, rank, step, forward, count(*) as tokens,
    (step * 15485863 + forward * 104729 + rank * 7919) % 2147483647 % 10007 as lot
  from valid
  group by run, rank, step, forward
),
drawn as (
  select
    *,
    sum(tokens) over (
      partition by run order by lot, step, rank, forward rows unbounded preceding
    ) - tokens as before
  from sized
)
select
  v.run, v.rank, v.step, v.forward, v.token, v.sequence, v.position,
  r.expert_ids, r.router_ids, r.weights, r.dropped, z.logits
from valid as v
join drawn as d
  on d.run = v.run and d.rank = v.rank and d.step = v.step and d.forward = v.forward
join routing as r
  on r.run = v.run and r.rank = v.rank and r.attempt = v.attempt and r.step = v.step
  and r.forward = v.forward and r.token = v.token and r.layer = $layer
left join logits as z
  on z.run = v.run and z.rank = v.rank and z.attempt = v.attempt and z.step = v.step
  and z.forward = v.forward and z.token = v.token and z.layer = $layer
where $most is null or d.before < $most
order by v.run, v.rank, v.step, v.forward, v.token
