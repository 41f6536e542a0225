-- Share of choices that a capacity factor would drop, per layer: the what-if curve.
-- capacity C = ceil(capacity_factor * tokens * k / experts) for each forward of each rank (each sequence
-- of it, where the capacity is per sequence); dropped_share = sum over experts of max(0, routed - C) /
-- sum of routed, summed over forwards. Assumes no rerouting, and that padding takes no room; who is
-- dropped depends on the order, how many does not. k is top_k, or where it varies the choices per token
-- that were made. Zero-compute experts have no capacity and are left out, and so are layers whose
-- experts choose (they are never over full).
-- source: `counts` where every forward behind the answer has counts of its own, in one capacity group.
-- Forwards that share a window of counts (decoding), or whose sequences have capacities of their own
-- (layers.capacity_groups above 1), need per-token rows of every token, of a whole sequence in the
-- second case: `rows` where some did. Without them they are left out. choices: what the answer stands on; covered: their share of all choices (0 to 1).
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $lowest float = 0.5 (0 or more): the smallest capacity factor
-- $highest float = 4.0 (0 or more): the largest
-- $points int = 36 (1 or more): how many, evenly spaced
with own as (
  select
    row_number() over (order by m.run, m.layer) as nth,
    m.run, m.layer, m.stream, m.experts, m.top_k
  from moe_layers as m
  where m.router <> 'expert-choice'
    and ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
),
windows as (
  select
    row_number() over (order by l.run, l.rank, l.attempt, l.window, l.layer) as id,
    l.run, l.rank, l.attempt, l.window as w, l.layer, l.tokens,
    o.nth, o.experts, o.top_k, o.stream,
    coalesce(l.capacity_groups, 1) > 1 as by_sequence,
    coalesce(r.tags, 0) = 1 as one_tag,
    l.forwards = 1 and coalesce(l.capacity_groups, 1) = 1 as alone
  from layers as l
  join own as o on o.run = l.run and o.layer = l.layer
  left join (
    select c.run, c.rank, c.attempt, c.window as w, c.layer, count(*) as tags
    from routers as c
    group by c.run, c.rank, c.attempt, c.window, c.layer
  ) as r
    on r.run = l.run and r.rank = l.rank and r.attempt = l.attempt and r.w = l.window
    and r.layer = l.layer
  where ($first_step is null or l.step >= $first_step)
    and ($last_step is null or l.step <= $last_step)
    and ($phase is null or l.phase = $phase)
    and ($rank is null or l.rank = $rank)
),
counted as (
  select n.id, n.one_tag, l.expert, l.routed
  from load as l
  join windows as n
    on n.run = l.run and n.rank = l.rank and n.attempt = l.attempt and n.w = l.window
    and n.layer = l.layer and l.expert < n.experts
  where ($first_step is null or l.step >= $first_step)
    and ($last_step is null or l.step <= $last_step)
    and ($phase is null or l.phase = $phase)
    and ($rank is null or l.rank = $rank)
    and ($first_layer is null or l.layer >= $first_layer)
    and ($last_layer is null or l.layer <= $last_layer)
),
-- Millions of groups of one row are slow to make, and most runs have one tag.
loads as (
  select id, routed from counted where one_tag
  union all
  select id, cast(sum(routed) as bigint) as routed
  from counted
  where not one_tag
  group by id, expert
),
sized as (
  select n.id, n.nth, n.experts, n.top_k, n.tokens, n.by_sequence, n.alone, a.routed
  from windows as n
  join (select id, cast(sum(routed) as bigint) as routed from loads group by id) as a
    on a.id = n.id
),
behind as materialized (
  select n.id, n.run, n.rank, n.layer, n.stream, n.by_sequence, f.step, f.forward
  from windows as n
  join steps as f
    on f.run = n.run and f.rank = n.rank and f.attempt = n.attempt and f.window = n.w
  where not n.alone
),
seen as (
  select
    n.id, r.step, r.forward, case when n.by_sequence then t.sequence else -1 end as sequence,
    coalesce(r.router_ids, r.expert_ids) as ids
  from routing as r
  join behind as n
    on n.run = r.run and n.rank = r.rank and n.step = r.step and n.forward = r.forward
    and n.layer = r.layer
  join tokens as t
    on t.run = r.run and t.rank = r.rank and t.step = r.step and t.forward = r.forward
    and t.token = r.token and t.stream = n.stream and not t.padding
  where ($first_layer is null or r.layer >= $first_layer)
    and ($last_layer is null or r.layer <= $last_layer)
),
groups_seen as (
  select
    id, step, forward, sequence, count(*) as tokens,
    sum(count(*)) over (partition by id) as kept
  from seen
  group by id, step, forward, sequence
),
chosen as (
  select id, step, forward, sequence, expert, count(*) as routed
  from (select id, step, forward, sequence, unnest(ids) as expert from seen) as choice
  group by id, step, forward, sequence, expert
),
from_rows as (
  select
    n.nth, c.routed,
    coalesce(
      n.top_k * g.tokens,
      sum(c.routed) over (partition by c.id, c.step, c.forward, c.sequence)
    ) as slots
  from chosen as c
  join sized as n on n.id = c.id and c.expert < n.experts
  join groups_seen as g
    on g.id = c.id and g.step = c.step and g.forward = c.forward and g.sequence = c.sequence
  where n.by_sequence or g.kept = n.tokens
),
from_counts as (
  select n.nth, l.routed, coalesce(n.top_k * n.tokens, n.routed) as slots
  from loads as l
  join sized as n on n.id = l.id
  where n.alone
),
alike as (
  select nth, slots, routed, count(*) as times, 0 as by_row
  from from_counts
  group by nth, slots, routed
  union all
  select nth, slots, routed, count(*) as times, 1 as by_row
  from from_rows
  group by nth, slots, routed
),
total as (
  select o.nth, o.run, o.layer, o.experts, sum(n.routed) as choices
  from own as o
  join sized as n on n.nth = o.nth
  group by o.nth, o.run, o.layer, o.experts
),
points as (
  select
    -- rounded, here and below: 1.2000000000000002 * 10 must not make a capacity of 13
    round(case when $points > 1 then $lowest + ($highest - $lowest) * n / ($points - 1)
      else $lowest end, 6) as capacity_factor
  from (select unnest(range($points)) as n) as numbers
)
select
  t.run, t.layer, p.capacity_factor,
  sum(a.times * greatest(0, a.routed - ceil(round(p.capacity_factor * a.slots / t.experts, 6))))
    / nullif(cast(sum(a.times * a.routed) as double), 0) as dropped_share,
  cast(sum(a.times * a.routed) as bigint) as choices,
  case when max(a.by_row) = 1 then 'rows' else 'counts' end as source,
  cast(sum(a.times * a.routed) as double) / nullif(cast(t.choices as double), 0) as covered
from total as t
join alike as a on a.nth = t.nth
cross join points as p
where t.choices > 0 and a.routed > 0
group by t.run, t.layer, t.choices, p.capacity_factor
order by t.run, t.layer, p.capacity_factor
