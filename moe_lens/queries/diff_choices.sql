-- The experts that the same tokens were given in two runs: what experts are matched by.
-- A row is a token and a layer; rank, sequence and position are run a's. Experts are in no order.
-- Where there are more than `most` tokens: whole sequences of run a, drawn evenly, until they hold about
-- so many; the same tokens in every layer of a stream.
-- $first_step int = null: first step that counts, of both runs
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $a text = null: one run
-- $b text = null: the other
-- $by text = token: token (same rank, step, forward, token) or position (same sequence and position)
-- $most int = 16384: tokens of each stream to look at; null: all
with requests as (
  select run, rank, sequence, max(request) as request
  from sequences
  where run in ($a, $b)
  group by run, rank, sequence
),
named as (
  select coalesce(bool_and(request is not null), false) as by_request from requests
),
placed as (
  select
    t.run, t.rank, t.stream, t.step, t.forward, t.token, t.sequence, t.position,
    case
      when $by = 'token' then concat('rank ', t.rank, ', step ', t.step, ', forward ', t.forward)
      when named.by_request then concat('request ', s.request)
      else concat('rank ', t.rank, ', sequence ', t.sequence)
    end as place,
    case when $by = 'token' then t.token else t.position end as nth
  from tokens as t
  cross join named
  left join steps as f
    on f.run = t.run and f.rank = t.rank and f.step = t.step and f.forward = t.forward
  left join requests as s on s.run = t.run and s.rank = t.rank and s.sequence = t.sequence
  left join outcomes as o
    on o.run = t.run and o.rank = t.rank and o.step = t.step and o.forward = t.forward
    and o.sequence = t.sequence and o.position = t.position and not o.kept
  where t.run in ($a, $b) and not t.padding and o.run is null
    and ($first_step is null or t.step >= $first_step)
    and ($last_step is null or t.step <= $last_step)
    and ($phase is null or f.phase = $phase)
),
ranked as (
  select
    *,
    row_number() over (
      partition by run, stream, place, nth order by step desc, forward desc, token desc
    ) as newest
  from placed
),
sized as (
  select
    rank, stream, sequence, count(*) as tokens,
    (sequence * 15485863 + rank * 7919) % 2147483647 % 10007 as lot
  from ranked
  where run = $a and newest = 1
  group by rank, stream, sequence
),
drawn as (
  select
    *,
    sum(tokens) over (
      partition by stream order by lot, rank, sequence rows unbounded preceding
    ) - tokens as before
  from sized
),
paired as (
  select
    a.stream, a.rank, a.sequence, a.position,
    a.step as step_a, a.forward as forward_a, a.token as token_a, a.rank as rank_a,
    b.step as step_b, b.forward as forward_b, b.token as token_b, b.rank as rank_b
  from (select * from ranked where run = $a and newest = 1) as a
  join (select * from ranked where run = $b and newest = 1) as b
    on a.stream = b.stream and a.place = b.place and a.nth = b.nth
  join drawn as d on d.rank = a.rank and d.stream = a.stream and d.sequence = a.sequence
  where $most is null or d.before < $most
)
select
  m.layer, p.rank, p.sequence, p.position, x.expert_ids as ids_a, y.expert_ids as ids_b
from moe_layers as m
join paired as p on p.stream = m.stream
join routing as x
  on x.run = $a and x.layer = m.layer and x.rank = p.rank_a and x.step = p.step_a
  and x.forward = p.forward_a and x.token = p.token_a
join routing as y
  on y.run = $b and y.layer = m.layer and y.rank = p.rank_b and y.step = p.step_b
  and y.forward = p.forward_b and y.token = p.token_b
where m.run = $a
  and ($first_layer is null or m.layer >= $first_layer)
  and ($last_layer is null or m.layer <= $last_layer)
order by m.layer, p.rank, p.sequence, p.position
