-- Each sequence of which rows were kept: what it cost, what it lost, how well it was predicted.
-- experts_used: distinct (layer, expert) pairs that its tokens chose, zero-compute experts left out.
-- dropped_rate: dropped choices over choices; unserved_rate: (token, layer) pairs in which every choice
-- was dropped, or none made, over all pairs (both 0 to 1). loss: mean of its positions' losses, or of
-- the losses given for it as a whole where there are none by position. Padding and rejected drafts
-- are left out. order: the largest dropped_rate, loss or number of tokens first; ties by rank, sequence.
-- Of an imported run it is not known what was dropped: 0 says nothing there.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $top int = 200: sequences
-- $order text = dropped: dropped, loss or tokens
with rejected as (
  select distinct run, rank, step, forward, sequence, position
  from outcomes
  where not kept
),
valid as (
  select
    t.run, t.rank, t.attempt, t.step, t.forward, t.stream, t.token, t.sequence, t.position, t.tag
  from tokens as t
  left join rejected as x
    on x.run = t.run and x.rank = t.rank and x.step = t.step and x.forward = t.forward
    and x.sequence = t.sequence and x.position = t.position and t.stream <> 'encoder'
  where not t.padding
    and x.run is null
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
by_position as (
  select v.run, v.rank, v.sequence, avg(cast(o.loss as double)) as loss
  from outcomes as o
  join valid as v
    on v.run = o.run and v.rank = o.rank and v.step = o.step and v.forward = o.forward
    and v.sequence = o.sequence and v.position = o.position
  where o.loss is not null
    and v.stream in ('main', 'decoder')
  group by v.run, v.rank, v.sequence
),
whole as (
  select o.run, o.rank, o.sequence, avg(cast(o.loss as double)) as loss
  from outcomes as o
  join (select distinct run, rank, step, forward, sequence from valid) as v
    on v.run = o.run and v.rank = o.rank and v.step = o.step and v.forward = o.forward
    and v.sequence = o.sequence
  where o.position is null
  group by o.run, o.rank, o.sequence
),
totals as (
  select
    run, rank, sequence,
    min(tag) as tag,
    min(step) as first_step,
    sum(case when stream like 'mtp%' then 0 else 1 end) as tokens
  from valid
  group by run, rank, sequence
),
rates as (
  select
    v.run, v.rank, v.sequence,
    cast(sum(coalesce(array_length(r.dropped), 0)) as double)
      / nullif(sum(array_length(r.expert_ids)), 0) as dropped_rate,
    avg(
      case when coalesce(array_length(r.dropped), 0) >= array_length(r.expert_ids) then 1e0
      else 0e0 end
    ) as unserved_rate
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  join valid as v
    on v.run = r.run and v.rank = r.rank and v.attempt = r.attempt and v.step = r.step
    and v.forward = r.forward and v.token = r.token and v.stream = m.stream
  where ($first_layer is null or r.layer >= $first_layer)
    and ($last_layer is null or r.layer <= $last_layer)
    and ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
  group by v.run, v.rank, v.sequence
),
said as (
  select run, rank, sequence, max(request) as request, max(tag) as tag
  from sequences
  group by run, rank, sequence
),
known as (
  select
    t.run, t.rank, t.sequence, s.request, coalesce(s.tag, t.tag) as tag, t.first_step, t.tokens,
    r.dropped_rate, r.unserved_rate, coalesce(p.loss, w.loss) as loss
  from totals as t
  left join rates as r on r.run = t.run and r.rank = t.rank and r.sequence = t.sequence
  left join by_position as p on p.run = t.run and p.rank = t.rank and p.sequence = t.sequence
  left join whole as w on w.run = t.run and w.rank = t.rank and w.sequence = t.sequence
  left join said as s on s.run = t.run and s.rank = t.rank and s.sequence = t.sequence
),
ranked as (
  select
    *,
    row_number() over (
      partition by run
      order by
        case $order when 'tokens' then tokens when 'loss' then loss else dropped_rate end
          desc nulls last,
        rank, sequence
    ) as place
  from known
),
choices as (
  select v.run, v.rank, v.sequence, r.layer, m.experts, unnest(r.expert_ids) as expert
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  join valid as v
    on v.run = r.run and v.rank = r.rank and v.attempt = r.attempt and v.step = r.step
    and v.forward = r.forward and v.token = r.token and v.stream = m.stream
  join ranked as k on k.run = v.run and k.rank = v.rank and k.sequence = v.sequence
  where k.place <= $top
    and ($first_layer is null or r.layer >= $first_layer)
    and ($last_layer is null or r.layer <= $last_layer)
    and ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
),
used as (
  select run, rank, sequence, count(*) as experts_used
  from (
    select distinct run, rank, sequence, layer, expert from choices where expert < experts
  ) as c
  group by run, rank, sequence
)
select
  k.run, k.rank, k.sequence, k.request, k.tag, k.first_step, cast(k.tokens as bigint) as tokens,
  coalesce(u.experts_used, 0) as experts_used, k.dropped_rate, k.unserved_rate, k.loss
from ranked as k
left join used as u on u.run = k.run and u.rank = k.rank and u.sequence = k.sequence
where k.place <= $top
order by k.run, k.place
