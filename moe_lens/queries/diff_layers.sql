-- How the routing of the same tokens differs between two runs, per layer.
-- flip_rate: share of tokens whose set of experts differs; top1_flip_rate: whose expert of largest
-- weight does. overlap: mean of |A and B| / k (1: the same experts; k the larger, where it varies).
-- weight_diff: of gate weights on the experts that both chose, mean and largest absolute difference
-- (runs that keep weights rounded differ by up to 2^-8 relative). margin: median of run a's k-th minus
-- next selection score, of all tokens and of the flipped ones: flips at a margin near zero are near
-- ties. first_flips: tokens whose first differing layer this is; unpaired: routed in one run alone.
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
    t.run, t.rank, t.stream, t.step, t.forward, t.token,
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
  select n.run, n.stream, n.place, n.nth, r.layer, r.expert_ids, r.weights, r.margin
  from ranked as n
  join routing as r
    on r.run = n.run and r.rank = n.rank and r.step = n.step and r.forward = n.forward
    and r.token = n.token
  join moe_layers as m on m.run = r.run and m.layer = r.layer and m.stream = n.stream
  where n.newest = 1
),
choices as (
  select
    run, stream, place, nth, layer, unnest(expert_ids) as expert, unnest(weights) as weight
  from routed
),
tops as (
  select
    run, stream, place, nth, layer, max_by(expert, weight) as top1, count(distinct expert) as k
  from choices
  group by run, stream, place, nth, layer
),
shared as (
  select
    a.stream, a.place, a.nth, a.layer,
    count(*) as in_common,
    sum(abs(cast(a.weight as double) - b.weight)) as diff,
    max(abs(cast(a.weight as double) - b.weight)) as largest_diff
  from choices as a
  join choices as b
    on b.stream = a.stream and b.place = a.place and b.nth = a.nth and b.layer = a.layer
    and b.expert = a.expert
  where a.run = $a and b.run = $b
  group by a.stream, a.place, a.nth, a.layer
),
compared as (
  select
    coalesce(a.layer, b.layer) as layer, a.stream, a.place, a.nth, a.margin,
    a.layer is null or b.layer is null as unpaired,
    case
      when a.layer is not null and b.layer is not null
        then coalesce(c.in_common, 0) < greatest(coalesce(ta.k, 0), coalesce(tb.k, 0))
    end as flipped,
    ta.top1 <> tb.top1 as top1_flipped,
    coalesce(c.in_common, 0) as in_common, greatest(ta.k, tb.k) as k, c.diff, c.largest_diff
  from (select * from routed where run = $a) as a
  full join (select * from routed where run = $b) as b
    on b.stream = a.stream and b.place = a.place and b.nth = a.nth and b.layer = a.layer
  left join tops as ta
    on ta.run = $a and ta.stream = a.stream and ta.place = a.place and ta.nth = a.nth
    and ta.layer = a.layer
  left join tops as tb
    on tb.run = $b and tb.stream = b.stream and tb.place = b.place and tb.nth = b.nth
    and tb.layer = b.layer
  left join shared as c
    on c.stream = a.stream and c.place = a.place and c.nth = a.nth and c.layer = a.layer
),
first_layers as (
  select layer, count(*) as first_flips
  from (select min(layer) as layer from compared where flipped group by stream, place, nth)
  group by layer
)
select
  c.layer,
  count(c.flipped) as tokens,
  cast(sum(cast(c.flipped as integer)) as bigint) as flips,
  avg(cast(c.flipped as integer)) as flip_rate,
  avg(cast(c.top1_flipped as integer)) as top1_flip_rate,
  avg(cast(c.in_common as double) / c.k) as overlap,
  sum(c.diff) / nullif(sum(case when c.diff is not null then c.in_common end), 0)
    as weight_diff_mean,
  max(c.largest_diff) as weight_diff_max,
  median(c.margin) as margin,
  median(case when c.flipped then c.margin end) as margin_at_flips,
  coalesce(max(f.first_flips), 0) as first_flips,
  count(case when c.unpaired then 1 end) as unpaired
from compared as c
left join first_layers as f on f.layer = c.layer
group by c.layer
order by c.layer
