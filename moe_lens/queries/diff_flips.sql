-- The first decisions that differ between two runs of the same tokens: by sequence, position, layer.
-- A row is a token and a layer whose sets of experts differ; step, forward and token are run a's,
-- weights in the order of their ids, margin is run a's k-th minus next selection score. What differs
-- after a token's first layer is often a consequence of it.
-- $first_step int = null: first step that counts, of both runs
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $a text = null: one run
-- $b text = null: the other
-- $by text = token: token (same rank, step, forward, token) or position (same sequence and position)
-- $top int = 20: rows
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
    t.run, t.rank, t.stream, t.step, t.forward, t.token, t.sequence, t.position, s.request,
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
routed as (
  select n.*, r.layer, r.expert_ids, r.weights, r.margin
  from ranked as n
  join routing as r
    on r.run = n.run and r.rank = n.rank and r.step = n.step and r.forward = n.forward
    and r.token = n.token
  join moe_layers as m on m.run = r.run and m.layer = r.layer and m.stream = n.stream
  where n.newest = 1
)
select
  a.rank, a.sequence, a.request, a.position, a.layer, a.stream, a.step, a.forward, a.token,
  a.expert_ids as ids_a, b.expert_ids as ids_b, a.weights as weights_a, b.weights as weights_b,
  a.margin
from (select * from routed where run = $a) as a
join (select * from routed where run = $b) as b
  on a.stream = b.stream and a.place = b.place and a.nth = b.nth and a.layer = b.layer
where array_sort(array_distinct(a.expert_ids)) <> array_sort(array_distinct(b.expert_ids))
order by a.rank, a.sequence, a.position, a.layer, a.step, a.forward
limit $top
