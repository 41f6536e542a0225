-- How many different sets of experts tokens chose, beside those that the router can reach, per layer.
-- reachable: the sets that a token can choose, C(E, k) or those within the limit of groups (256
-- experts in 8 groups, 8 experts from 4 of them: 7.161e13 of 4.097e14), reachable_bits its log2. Null
-- where tokens do not all choose as many (zero-compute experts, a dynamic k). distinct_sets: seen in
-- the sample; singletons: chosen by one token alone; coverage = 1 - singletons / tokens (Good 1953):
-- the chance that the next token's set is a known one. groups_used: groups that a token's experts lie
-- in, mean. The router's choices, in any order, from kept rows; padding is left out. A layer with more
-- than `most` rows is thinned evenly to about so many.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $most int = 40000 (1 or more): tokens of each layer to look at
with thinning as (
  select run, layer, greatest(1, cast(ceil(count(*) / cast($most as double)) as bigint)) as every
  from routing
  where ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
    and ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($rank is null or rank = $rank)
  group by run, layer
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
sets as (
  select r.run, r.layer, array_sort(coalesce(r.router_ids, r.expert_ids)) as chosen, count(*) as times
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  join thinning as s on s.run = r.run and s.layer = r.layer
  left join excluded as x
    on x.run = r.run and x.rank = r.rank and x.attempt = r.attempt and x.step = r.step
    and x.forward = r.forward and x.stream = m.stream and x.token = r.token
  where x.run is null
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
  group by r.run, r.layer, array_sort(coalesce(r.router_ids, r.expert_ids))
),
members as (
  select run, layer, chosen, times, unnest(chosen) as expert
  from sets
),
spread as (
  select
    s.run, s.layer, s.chosen, max(s.times) as times,
    count(distinct floor(cast(s.expert as double) * m.groups / m.experts)) as groups_used
  from members as s
  join moe_layers as m on m.run = s.run and m.layer = s.layer
  where m.groups > 1 and m.experts % m.groups = 0 and s.expert < m.experts
  group by s.run, s.layer, s.chosen
),
grouped as (
  select run, layer, sum(groups_used * times) / cast(sum(times) as double) as groups_used
  from spread
  group by run, layer
),
counted as (
  select
    run, layer,
    cast(sum(times) as bigint) as tokens,
    count(*) as distinct_sets,
    cast(sum(case when times = 1 then 1 else 0 end) as bigint) as singletons
  from sets
  group by run, layer
)
select
  c.run, c.layer, m.experts, m.top_k, m.groups, m.top_groups,
  case when m.reachable_bits < 1000 then round(power(2e0, m.reachable_bits)) end as reachable,
  m.reachable_bits,
  c.tokens, c.distinct_sets, c.singletons,
  1 - c.singletons / cast(c.tokens as double) as coverage,
  g.groups_used
from counted as c
join moe_layers as m on m.run = c.run and m.layer = c.layer
left join grouped as g on g.run = c.run and g.layer = c.layer
order by c.run, c.layer
