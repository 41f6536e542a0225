-- The experts that serve the same tokens as one expert, most frequent first.
-- together: tokens that chose both; share is of the expert's tokens (0 to 1); expected = n_expert x
-- n_companion / tokens, what two independent choices would give; lift = together / expected (1: they
-- ignore each other). From kept rows; padding and zero-compute experts are left out.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: layer of the expert
-- $expert int = 0: which expert
-- $top int = 10: companions
with excluded as (
  -- Left out by a join that finds nothing: most often these are few, and all others are many.
  select t.run, t.rank, t.attempt, t.step, t.forward, t.stream, t.token
  from tokens as t
  where (t.padding or ($tag is not null and t.tag <> $tag))
    and ($first_step is null or t.step >= $first_step)
    and ($last_step is null or t.step <= $last_step)
    and ($rank is null or t.rank = $rank)
),
valid as (
  select
    r.run, r.expert_ids, m.experts,
    case when array_contains(r.expert_ids, $expert) then 1 end as here
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  left join excluded as x
    on x.run = r.run and x.rank = r.rank and x.attempt = r.attempt and x.step = r.step
    and x.forward = r.forward and x.stream = m.stream and x.token = r.token
  where r.layer = $layer
    and x.run is null
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
totals as (
  select run, count(*) as tokens, count(here) as mine from valid group by run
),
choices as (
  select run, experts, here, unnest(expert_ids) as companion from valid
),
counted as (
  select run, companion, count(*) as theirs, count(here) as together
  from choices
  where companion < experts and companion <> $expert
  group by run, companion
),
compared as (
  select
    c.run, c.companion, c.together,
    cast(c.together as double) / t.mine as share,
    cast(t.mine as double) * c.theirs / t.tokens as expected,
    row_number() over (partition by c.run order by c.together desc, c.companion) as place
  from counted as c
  join totals as t on t.run = c.run
  where c.together > 0
)
select run, companion, together, share, expected, together / expected as lift
from compared
where place <= $top
order by run, place
