-- The vocabulary that one expert serves: token ids ranked by how much more often it takes them.
-- times: tokens with this id that chose the expert; occurrences: those routed in the layer; share =
-- times / occurrences (0 to 1). overall_share is the same over all ids, lift = share / overall_share
-- (1: the id is nothing to the expert). Needs vocabulary ids (token_ids=True when recording): tokens
-- without one, and padding, count nowhere. Few choices make large lifts by chance: min_times.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: layer of the expert
-- $expert int = 0: which expert
-- $top int = 20: token ids
-- $min_times int = 5: choices below which a token id does not appear
with placed as (
  -- The layers first: which stream they are of is then no key of the large join.
  select t.run, t.rank, t.attempt, t.step, t.forward, t.token, t.token_id
  from tokens as t
  join moe_layers as m on m.run = t.run and m.stream = t.stream
  where m.layer = $layer
    and not t.padding
    and t.token_id is not null
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
  select p.run, p.token_id, array_contains(r.expert_ids, $expert) as here
  from routing as r
  join placed as p
    on p.run = r.run and p.rank = r.rank and p.attempt = r.attempt and p.step = r.step
    and p.forward = r.forward and p.token = r.token
  where r.layer = $layer
),
counted as (
  select
    run, token_id,
    cast(sum(case when here then 1 else 0 end) as bigint) as times,
    count(*) as occurrences
  from chosen
  group by run, token_id
),
shared as (
  select
    *,
    cast(times as double) / occurrences as share,
    cast(sum(times) over (partition by run) as double) / sum(occurrences) over (partition by run)
      as overall_share
  from counted
),
ranked as (
  select
    *,
    row_number() over (partition by run order by share desc, times desc, token_id) as place
  from shared
  where times >= $min_times and times > 0
)
select run, token_id, times, occurrences, share, overall_share, share / overall_share as lift
from ranked
where place <= $top
order by run, place
