-- Loss of tokens with a dropped choice against that of tokens without one, per tag.
-- dropped: at least one choice of the token was dropped in some layer (within first_layer and
-- last_layer). loss is the mean over tokens of a loss given per position, in the user's unit; loss_se
-- its standard error, as if tokens were independent (they are not within a sequence: read it as a
-- lower bound). Tokens without a loss of their own, padding and rejected drafts are left out; so are
-- encoders and MTP heads, whose tokens the loss is not of.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
with hit as (
  select distinct r.run, r.rank, r.attempt, r.step, r.forward, m.stream, r.token
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  where array_length(r.dropped) > 0
    and ($first_layer is null or r.layer >= $first_layer)
    and ($last_layer is null or r.layer <= $last_layer)
    and ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
    and ($first_step is null or r.step >= $first_step)
    and ($last_step is null or r.step <= $last_step)
    and ($rank is null or r.rank = $rank)
),
rejected as (
  select distinct run, rank, step, forward, sequence, position
  from outcomes
  where not kept
),
judged as materialized (
  -- Materialized, since DuckDB else groups by every token below the join.
  select t.run, t.tag, h.run is not null as dropped, cast(o.loss as double) as loss
  from outcomes as o
  join tokens as t
    on t.run = o.run and t.rank = o.rank and t.step = o.step and t.forward = o.forward
    and t.sequence = o.sequence and t.position = o.position
  left join rejected as x
    on x.run = o.run and x.rank = o.rank and x.step = o.step and x.forward = o.forward
    and x.sequence = o.sequence and x.position = o.position
  left join hit as h
    on h.run = t.run and h.rank = t.rank and h.attempt = t.attempt and h.step = t.step
    and h.forward = t.forward and h.stream = t.stream and h.token = t.token
  where o.loss is not null
    and x.run is null
    and not t.padding
    and t.stream in ('main', 'decoder')
    and ($first_step is null or o.step >= $first_step)
    and ($last_step is null or o.step <= $last_step)
    and ($rank is null or o.rank = $rank)
    and ($tag is null or t.tag = $tag)
    and (
      $phase is null
      or exists (
        select 1 from steps as f
        where f.run = t.run and f.rank = t.rank and f.step = t.step and f.forward = t.forward
          and f.phase = $phase
      )
    )
)
select
  run, tag, dropped,
  count(*) as tokens,
  avg(loss) as loss,
  stddev_samp(loss) / sqrt(count(*)) as loss_se
from judged
group by run, tag, dropped
order by run, tag, dropped
