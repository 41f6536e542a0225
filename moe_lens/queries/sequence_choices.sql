-- What routers chose along whole sequences, and what became of it: a row a token and layer.
-- `nth` numbers the tokens, the same in every layer of a stream: sequence after sequence (by rank and
-- number), each in the order of its positions. expert_ids, weights: as the experts received them;
-- router_ids: the router's own choices, where others ran (moe_layers.faithful), else null; dropped: slots
-- that no expert computed, null where none; logits: where they were recorded, in bfloat16; loss: of the
-- prediction made at the token. Where a position was routed more than once, its last routing counts. From
-- kept rows; padding and rejected drafts are left out. Where a stream has more than `most` tokens: whole
-- sequences, drawn evenly, until they hold about so many.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $sequences text = null: only these, as rank:sequence,rank:sequence
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $most int = 4096: tokens of each stream to look at; null: all
with rejected as (
  select distinct run, rank, step, forward, sequence, position
  from outcomes
  where not kept
),
asked as (
  select run, layer, stream
  from moe_layers
  where ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
),
valid as (
  select
    t.run, t.rank, t.attempt, t.step, t.forward, t.stream, t.token, t.sequence, t.position, t.tag,
    t.token_id
  from tokens as t
  join (select distinct run, stream from asked) as s on s.run = t.run and s.stream = t.stream
  left join rejected as o
    on o.run = t.run and o.rank = t.rank and o.step = t.step and o.forward = t.forward
    and o.sequence = t.sequence and o.position = t.position and t.stream <> 'encoder'
  where not t.padding
    and o.run is null
    and ($first_step is null or t.step >= $first_step)
    and ($last_step is null or t.step <= $last_step)
    and ($tag is null or t.tag = $tag)
    and ($rank is null or t.rank = $rank)
    and (
      $sequences is null
      or array_contains(split($sequences, ','), concat(t.rank, ':', t.sequence))
    )
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
    run, rank, stream, sequence, count(*) as tokens,
    (sequence * 15485863 + rank * 7919) % 2147483647 % 10007 as lot
  from valid
  group by run, rank, stream, sequence
),
drawn as (
  select
    *,
    sum(tokens) over (
      partition by run, stream order by lot, rank, sequence rows unbounded preceding
    ) - tokens as before
  from sized
),
placed as (
  select
    v.*,
    row_number() over (
      partition by v.run, v.rank, v.stream, v.sequence, v.position
      order by v.step desc, v.forward desc, v.token desc
    ) as newest
  from valid as v
  join drawn as d
    on d.run = v.run and d.rank = v.rank and d.stream = v.stream and d.sequence = v.sequence
  where $most is null or d.before < $most
),
numbered as materialized (
  select
    *, row_number() over (partition by run, stream order by rank, sequence, position) - 1 as nth
  from placed
  where newest = 1
),
lost as (
  -- Joined first: most often these are few tokens, and all others are many.
  select o.run, o.rank, o.step, o.forward, o.sequence, o.position, max(o.loss) as loss
  from outcomes as o
  join (select distinct run, rank, step, forward, sequence, position from numbered) as n
    on o.run = n.run and o.rank = n.rank and o.step = n.step and o.forward = n.forward
    and o.sequence = n.sequence and o.position = n.position
  group by o.run, o.rank, o.step, o.forward, o.sequence, o.position
)
select
  n.run, a.layer, n.nth, n.rank, n.step, n.forward, n.sequence, n.position, n.tag, n.token_id,
  r.expert_ids, r.router_ids, r.weights, r.dropped, r.entropy, r.margin, z.logits,
  case when n.stream in ('main', 'decoder') then o.loss end as loss
from asked as a
join routing as r on r.run = a.run and r.layer = a.layer
join numbered as n
  on n.run = r.run and n.rank = r.rank and n.attempt = r.attempt and n.step = r.step
  and n.forward = r.forward and n.stream = a.stream and n.token = r.token
left join logits as z
  on z.run = r.run and z.rank = r.rank and z.attempt = r.attempt and z.step = r.step
  and z.forward = r.forward and z.token = r.token and z.layer = r.layer
left join lost as o
  on o.run = n.run and o.rank = n.rank and o.step = n.step and o.forward = n.forward
  and o.sequence = n.sequence and o.position = n.position
where ($first_layer is null or r.layer >= $first_layer)
  and ($last_layer is null or r.layer <= $last_layer)
order by n.run, a.layer, n.nth
