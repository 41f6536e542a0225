-- Which tokens two runs have in common: what a comparison of their routing stands on.
-- One row: tokens of run a, of run b, of both, of one alone (and one of those), and how many of both
-- have another vocabulary id, where the ids were kept. Padding is left out, and so are rejected
-- drafts. Per-token rows only: sampled runs hold a part.
-- $first_step int = null: first step that counts, of both runs
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $a text = null: one run
-- $b text = null: the other
-- $by text = token: token (same rank, step, forward, token) or position (same sequence and position)
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
    t.run, t.stream, t.step, t.forward, t.token, t.token_id,
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
of_a as (
  select * from ranked where run = $a and newest = 1
),
of_b as (
  select * from ranked where run = $b and newest = 1
)
select
  count(a.place) as tokens_a,
  count(b.place) as tokens_b,
  count(case when a.place is not null and b.place is not null then 1 end) as both,
  count(case when b.place is null then 1 end) as only_a,
  count(case when a.place is null then 1 end) as only_b,
  min(case when b.place is null then concat(a.place, ', ', $by, ' ', a.nth) end) as first_only_a,
  min(case when a.place is null then concat(b.place, ', ', $by, ' ', b.nth) end) as first_only_b,
  count(case when a.token_id <> b.token_id then 1 end) as other_text
from of_a as a
full join of_b as b on a.stream = b.stream and a.place = b.place and a.nth = b.nth
