-- Which experts the tokens of a layer ran on, in order: what a cache of experts is asked for.
-- A row is a token and an expert that computed something for it. `nth` numbers the tokens, the same in
-- every layer of a stream: with by = sequence, sequence after sequence (by rank and number), each in the
-- order of its positions; with by = forward, forward after forward. Where a position was routed more than
-- once, its last routing counts. From kept rows; padding, rejected drafts, dropped choices and
-- zero-compute experts are left out. Where there are more than `most` tokens: whole sequences, drawn
-- evenly, or the first forwards of each run, until they hold about so many.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: which layer
-- $by text = sequence (sequence or forward): what follows one after another, and is drawn whole
-- $most int = 16384: tokens to look at; null: all
with rejected as (
  select distinct run, rank, step, forward, sequence, position
  from outcomes
  where not kept
),
valid as (
  -- A piece is what is drawn whole: a sequence, or a forward.
  select
    t.run, t.rank, t.attempt, t.step, t.forward, t.token, t.sequence, t.position, t.tag, m.experts,
    case when $by = 'sequence' then t.sequence else t.step end as piece,
    case when $by = 'sequence' then 0 else t.forward end as part
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
    run, rank, piece, part, count(*) as tokens,
    case
      when $by = 'sequence' then (piece * 15485863 + rank * 7919) % 2147483647 % 10007
      else 0
    end as lot
  from valid
  group by run, rank, piece, part
),
drawn as (
  select
    *,
    sum(tokens) over (
      partition by run order by lot, rank, piece, part rows unbounded preceding
    ) - tokens as before
  from sized
),
placed as (
  select
    v.*,
    row_number() over (
      partition by v.run, v.rank, v.sequence, v.position
      order by v.step desc, v.forward desc, v.token desc
    ) as newest
  from valid as v
  join drawn as d
    on d.run = v.run and d.rank = v.rank and d.piece = v.piece and d.part = v.part
  where $most is null or d.before < $most
),
numbered as (
  select
    *,
    row_number() over (
      partition by run
      order by
        rank,
        case when $by = 'forward' then step end,
        case when $by = 'forward' then forward end,
        sequence, position
    ) - 1 as nth
  from placed
  where newest = 1
),
choices as materialized (
  -- Materialized, since DuckDB else sorts and groups by every column below the join.
  select
    n.run, n.nth, n.rank, n.sequence, n.tag, n.position, n.step, n.forward, n.experts,
    r.expert_ids, r.dropped, unnest(range(array_length(r.expert_ids))) as slot
  from routing as r
  join numbered as n
    on n.run = r.run and n.rank = r.rank and n.attempt = r.attempt and n.step = r.step
    and n.forward = r.forward and n.token = r.token
  where r.layer = $layer
)
select distinct
  run, nth, rank, sequence, tag, position, step, forward, expert_ids[slot + 1] as expert
from choices
where expert_ids[slot + 1] < experts
  and (dropped is null or not array_contains(dropped, slot))
order by run, nth, expert
