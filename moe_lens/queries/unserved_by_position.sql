-- Dropped choices and unserved tokens along the sequence, per layer.
-- position is the first of `width` positions. A choice is dropped when no expert computed it, a token
-- unserved in a layer when all its choices were dropped, or it made none. unserved_rate is of tokens,
-- dropped_rate of choices (0 to 1). A capacity that is filled in order of position drops the late
-- ones. From kept rows; padding counts nowhere. Of an imported run it is not known what was dropped: 0
-- says nothing there.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $width int = 16: positions per bucket
with placed as (
  select
    t.run, t.rank, t.attempt, t.step, t.forward, t.stream, t.token,
    t.position - t.position % $width as position
  from tokens as t
  where not t.padding
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
judged as materialized (
  -- Materialized, since DuckDB else groups by every token below the join.
  select
    r.run, r.layer, p.position,
    array_length(r.expert_ids) as choices,
    coalesce(array_length(r.dropped), 0) as dropped
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  join placed as p
    on p.run = r.run and p.rank = r.rank and p.attempt = r.attempt and p.step = r.step
    and p.forward = r.forward and p.stream = m.stream and p.token = r.token
  -- Of both, lest tokens are joined with every layer first.
  where ($first_layer is null or r.layer >= $first_layer)
    and ($last_layer is null or r.layer <= $last_layer)
    and ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
)
select
  run, layer, position,
  count(*) as tokens,
  cast(sum(case when dropped >= choices then 1 else 0 end) as bigint) as unserved,
  avg(case when dropped >= choices then 1e0 else 0e0 end) as unserved_rate,
  cast(sum(dropped) as bigint) as dropped,
  cast(sum(dropped) as double) / nullif(cast(sum(choices) as double), 0) as dropped_rate
from judged
group by run, layer, position
order by run, layer, position
