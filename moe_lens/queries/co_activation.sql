-- Which experts of a layer are chosen together by one token, beside what chance would give.
-- A row is an ordered pair of experts that were both chosen at all. together: tokens that chose both;
-- share is of `expert`'s tokens (0 to 1); expected = n_expert x n_other / tokens, for independent
-- choices; lift = together / expected. From kept rows; padding and zero-compute experts are left out.
-- A layer with more than `most` rows is thinned evenly to about so many, and counts are of these.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: which layer
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
valid as (
  select r.run, r.expert_ids, m.experts
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  join thinning as s on s.run = r.run
  left join excluded as x
    on x.run = r.run and x.rank = r.rank and x.attempt = r.attempt and x.step = r.step
    and x.forward = r.forward and x.stream = m.stream and x.token = r.token
  where r.layer = $layer
    and x.run is null
    and one_in(s.every, r.step, r.forward, r.token)
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
  select run, cast(count(*) as double) as tokens from valid group by run
),
firsts as (
  select run, experts, unnest(expert_ids) as expert, expert_ids from valid
),
pairs as (
  select run, experts, expert, unnest(expert_ids) as other from firsts
),
counted as (
  -- An expert with itself: the tokens that chose it.
  select run, expert, other, count(*) as together
  from pairs
  where expert < experts and other < experts
  group by run, expert, other
),
loads as (
  select run, expert, together as chosen from counted where expert = other
)
select
  a.run, a.expert, b.expert as other,
  coalesce(c.together, 0) as together,
  cast(coalesce(c.together, 0) as double) / a.chosen as share,
  a.chosen * (b.chosen / t.tokens) as expected,
  coalesce(c.together, 0) / (a.chosen * (b.chosen / t.tokens)) as lift
from loads as a
join loads as b on b.run = a.run and b.expert <> a.expert
join totals as t on t.run = a.run
left join counted as c on c.run = a.run and c.expert = a.expert and c.other = b.expert
order by a.run, a.expert, b.expert
