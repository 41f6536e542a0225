-- Counts of layers in single forwards: what metrics of a batch, and losses at a scope, are made of.
-- A row is a layer, a forward of a rank (its window of counts) and an expert, zero-compute experts too;
-- experts without choices and probability have no row. Only windows of one forward: those of decoding may hold
-- several, and are left out. Whole steps, drawn evenly over each run, until they hold about `most`
-- forwards. capacity is of one expert in each of capacity_groups groups (null: dropless); prob_sum is
-- over the tokens whose logits were finite.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $most int = 32 (1 or more): forwards to look at
with alone as (
  select
    l.run, l.layer, l.rank, l.attempt, l.window as w, l.step, l.tokens, l.capacity,
    l.capacity_groups,
    dense_rank() over (partition by l.run, l.layer order by l.step) as nth,
    cast(count(*) over (partition by l.run, l.layer) as double) as forwards
  from layers as l
  where l.forwards = 1
    and l.tokens > 0
    and ($first_step is null or l.step >= $first_step)
    and ($last_step is null or l.step <= $last_step)
    and ($phase is null or l.phase = $phase)
    and ($rank is null or l.rank = $rank)
    and ($first_layer is null or l.layer >= $first_layer)
    and ($last_layer is null or l.layer <= $last_layer)
),
drawn as materialized (
  select *, row_number() over () as id
  from alone
  where (nth - 1) % greatest(1, cast(ceil(forwards / $most) as bigint)) = 0
),
-- By one number: groups of two columns or more take ten times as long to make.
summed as (
  select
    d.id * cast(1000000 as bigint) + l.expert as key,
    cast(sum(l.routed) as bigint) as routed,
    cast(sum(l.processed) as bigint) as processed,
    cast(sum(l.overflowed) as bigint) as overflowed,
    case when count(*) = count(l.prob_sum) then sum(cast(l.prob_sum as double)) end as prob_sum
  from load as l
  join drawn as d
    on d.run = l.run and d.rank = l.rank and d.attempt = l.attempt and d.w = l.window
    and d.layer = l.layer
  where ($first_layer is null or l.layer >= $first_layer)
    and ($last_layer is null or l.layer <= $last_layer)
    and ($first_step is null or l.step >= $first_step)
    and ($last_step is null or l.step <= $last_step)
    and ($phase is null or l.phase = $phase)
    and ($rank is null or l.rank = $rank)
  group by key
)
select
  d.run, d.layer, d.rank, d.step, d.w as "window", d.tokens, d.capacity, d.capacity_groups,
  cast(s.key % 1000000 as integer) as expert, s.routed, s.processed, s.overflowed, s.prob_sum
from summed as s
join drawn as d on d.id = s.key // 1000000
order by d.run, d.layer, d.step, d.rank, d.w, expert
