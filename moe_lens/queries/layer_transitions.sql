-- Where the tokens of each expert go in the next layer: first choice to first choice.
-- A token's first choice is the expert of largest gate weight. next_expert is the first choice in
-- `layer` + 1, which must be of the same stream (else there are no rows). share is of the expert's
-- tokens (0 to 1; over all next experts they sum to 1). From kept rows; padding, and tokens without a
-- choice in either layer, count nowhere, and so do tokens without gate weights: which of their choices
-- is the first is not known. A layer with more than `most` rows is thinned evenly to about
-- so many, and counts are of these.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: the layer that the tokens come from
-- $top int = 0: transitions, most frequent first; 0: all
-- $most int = 40000: tokens to look at; null: all
with thinning as (
  select run, greatest(1, cast(ceil(count(*) / cast($most as double)) as bigint)) as every
  from routing
  where layer = $layer
    and ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($rank is null or rank = $rank)
  group by run
),
excluded as (
  -- Left out by a join that finds nothing: most often these are few, and all others are many.
  select t.run, t.rank, t.attempt, t.step, t.forward, t.stream, t.token
  from tokens as t
  where (t.padding or ($tag is not null and t.tag <> $tag))
    and ($first_step is null or t.step >= $first_step)
    and ($last_step is null or t.step <= $last_step)
    and ($rank is null or t.rank = $rank)
),
firsts as (
  select
    r.run, r.rank, r.attempt, r.step, r.forward, m.stream, r.token, r.expert_ids, r.weights
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  join thinning as s on s.run = r.run
  left join excluded as x
    on x.run = r.run and x.rank = r.rank and x.attempt = r.attempt and x.step = r.step
    and x.forward = r.forward and x.stream = m.stream and x.token = r.token
  where r.layer = $layer
    and x.run is null
    and one_in(s.every, r.step, r.forward, r.token)
    and array_length(r.expert_ids) > 0
    and ($first_step is null or r.step >= $first_step)
    and ($last_step is null or r.step <= $last_step)
    and ($rank is null or r.rank = $rank)
    -- Not by way of their tokens: these are not in every trace.
    and (
      $phase is null
      or exists (
        select 1 from steps as f
        where f.run = r.run and f.rank = r.rank and f.step = r.step and f.forward = r.forward
          and f.phase = $phase
      )
    )
    and (
      $tag is null
      or r.run in (select run from tokens where tag = $tag)
      or r.run in (select run from slices where tag = $tag)
    )
),
nexts as (
  select
    r.run, r.rank, r.attempt, r.step, r.forward, m.stream, r.token, r.expert_ids, r.weights
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  join thinning as s on s.run = r.run
  where r.layer = $layer + 1
    and one_in(s.every, r.step, r.forward, r.token)
    and array_length(r.expert_ids) > 0
    and ($first_step is null or r.step >= $first_step)
    and ($last_step is null or r.step <= $last_step)
    and ($rank is null or r.rank = $rank)
),
moves as materialized (
  -- Materialized, since DuckDB else groups by every token below the join.
  select
    a.run,
    a.expert_ids[array_position(a.weights, array_aggregate(a.weights, 'max'))] as expert,
    b.expert_ids[array_position(b.weights, array_aggregate(b.weights, 'max'))] as next_expert
  from firsts as a
  join nexts as b
    on b.run = a.run and b.rank = a.rank and b.attempt = a.attempt and b.step = a.step
    and b.forward = a.forward and b.token = a.token and b.stream = a.stream
),
counted as (
  select run, expert, next_expert, count(*) as tokens
  from moves
  where expert is not null and next_expert is not null
  group by run, expert, next_expert
),
ranked as (
  select
    *,
    cast(tokens as double) / sum(tokens) over (partition by run, expert) as share,
    row_number() over (partition by run order by tokens desc, expert, next_expert) as place
  from counted
)
select run, expert, next_expert, tokens, share
from ranked
where $top = 0 or place <= $top
order by run, place
