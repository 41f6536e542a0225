-- What the router of a layer chose along whole sequences: a row a token.
-- `nth` numbers the tokens, the same in every layer of a stream: sequence after sequence (by rank and
-- number), each in the order of its positions. expert_ids: the router's own choices; weights: the gate
-- weights, null where other experts ran than it chose; loss: of the prediction made at the token. Where a
-- position was routed more than once, its last routing counts. From kept rows; padding and rejected
-- drafts are left out. Where there are more than `most` tokens: whole sequences, drawn evenly, until they
-- hold about so many.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: which layer
-- $most int = 16384: tokens to look at; null: all
with rejected as (
  select distinct run, rank, step, forward, sequence, position
  from outcomes
  where not kept
),
valid as (
  select
    t.run, t.rank, t.attempt, t.step, t.forward, t.stream, t.token, t.sequence, t.position, t.tag,
    t.token_id
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
    run, rank, sequence, count(*) as tokens,
    (sequence * 15485863 + rank * 7919) % 2147483647 % 10007 as lot
  from valid
  group by run, rank, sequence
),
drawn as (
  select
    *,
    sum(tokens) over (
      partition by run order by lot, rank, sequence rows unbounded preceding
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
  join drawn as d on d.run = v.run and d.rank = v.rank and d.sequence = v.sequence
  where $most is null or d.before < $most
),
numbered as (
  select *, row_number() over (partition by run order by rank, sequence, position) - 1 as nth
  from placed
  where newest = 1
),
lost as (
  select run, rank, step, forward, sequence, position, max(loss) as loss
  from outcomes
  where position is not null
  group by run, rank, step, forward, sequence, position
)
select
  n.run, n.nth, n.rank, n.step, n.forward, n.sequence, n.position, n.tag, n.token_id,
  coalesce(r.router_ids, r.expert_ids) as expert_ids,
  case when r.router_ids is null then r.weights end as weights,
  r.dropped, r.entropy, r.margin,
  case when n.stream in ('main', 'decoder') then o.loss end as loss
from numbered as n
join routing as r
  on r.run = n.run and r.rank = n.rank and r.attempt = n.attempt and r.step = n.step
  and r.forward = n.forward and r.token = n.token and r.layer = $layer
left join lost as o
  on o.run = n.run and o.rank = n.rank and o.step = n.step and o.forward = n.forward
  and o.sequence = n.sequence and o.position = n.position
order by n.run, n.nth
