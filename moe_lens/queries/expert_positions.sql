-- Where in a sequence one expert is chosen: its share of the tokens at each stretch of positions.
-- position is the first of `width` positions; tokens: valid tokens routed there in the layer; chosen:
-- those that chose the expert; share = chosen / tokens (0 to 1). From kept rows alone.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: layer of the expert
-- $expert int = 0: which expert
-- $width int = 16: positions per bucket
with placed as (
  -- The layers first: which stream they are of is then no key of the large join.
  select
    t.run, t.rank, t.attempt, t.step, t.forward, t.token,
    t.position - t.position % $width as position
  from tokens as t
  join moe_layers as m on m.run = t.run and m.stream = t.stream
  where m.layer = $layer
    and not t.padding
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
chosen as materialized (
  -- Materialized, since DuckDB else groups by every token below the join.
  select p.run, p.position, array_contains(r.expert_ids, $expert) as here
  from routing as r
  join placed as p
    on p.run = r.run and p.rank = r.rank and p.attempt = r.attempt and p.step = r.step
    and p.forward = r.forward and p.token = r.token
  where r.layer = $layer
)
select
  run, position,
  count(*) as tokens,
  cast(sum(case when here then 1 else 0 end) as bigint) as chosen,
  avg(case when here then 1e0 else 0e0 end) as share
from chosen
group by run, position
order by run, position
