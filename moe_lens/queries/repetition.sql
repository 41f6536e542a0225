-- How often a token is routed as the token before it in its sequence was, per layer.
-- A pair is two valid tokens at consecutive positions of one sequence; where a position was routed
-- more than once, its last routing counts. repeated_share: choices that the token before made too,
-- over all choices of the pairs' later tokens (0 to 1). chance: the same if both tokens drew their
-- experts independently, each expert with p_e = n_e / tokens: sum of p_e^2 / sum of p_e. lift is their
-- ratio. From kept rows; padding and zero-compute experts are left out. Where there are more than
-- `most` tokens, whole sequences are drawn, evenly, until they hold about so many.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $most int = 65536: tokens of each stream to look at; null: all
with sized as (
  select
    run, rank, stream, sequence, count(*) as tokens,
    (sequence * 15485863 + rank * 7919) % 2147483647 % 10007 as lot
  from tokens
  where not padding
    and ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
  group by run, rank, stream, sequence
),
drawn as (
  select
    *,
    sum(tokens) over (
      partition by run, stream order by lot, rank, sequence rows unbounded preceding
    ) - tokens as before
  from sized
),
ordered as (
  select
    t.run, t.rank, t.attempt, t.step, t.forward, t.stream, t.token, t.sequence, t.position,
    row_number() over (
      partition by t.run, t.rank, t.stream, t.sequence, t.position
      order by t.step desc, t.forward desc, t.token desc
    ) as newest
  from tokens as t
  join drawn as d
    on d.run = t.run and d.rank = t.rank and d.stream = t.stream and d.sequence = t.sequence
  where ($most is null or d.before < $most)
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
routed as (
  select
    o.run, o.rank, o.stream, o.sequence, o.position, r.layer, m.experts, r.expert_ids
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  join ordered as o
    on o.run = r.run and o.rank = r.rank and o.attempt = r.attempt and o.step = r.step
    and o.forward = r.forward and o.stream = m.stream and o.token = r.token
  where o.newest = 1
    and ($first_layer is null or r.layer >= $first_layer)
    and ($last_layer is null or r.layer <= $last_layer)
    and ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
),
paired as (
  select a.run, a.layer, a.experts, a.expert_ids, b.expert_ids as before, b.run is not null as pair
  from routed as a
  left join routed as b
    on b.run = a.run and b.rank = a.rank and b.stream = a.stream and b.sequence = a.sequence
    and b.layer = a.layer and b.position = a.position - 1
),
totals as (
  select
    run, layer, count(*) as tokens,
    cast(sum(case when pair then 1 else 0 end) as bigint) as pairs
  from paired
  group by run, layer
),
choices as (
  select run, layer, experts, before, pair, unnest(expert_ids) as expert from paired
),
by_expert as (
  select
    run, layer, expert, count(*) as chosen,
    sum(case when pair then 1 else 0 end) as of_pairs,
    sum(case when pair and array_contains(before, expert) then 1 else 0 end) as repeated
  from choices
  where expert < experts
  group by run, layer, expert
),
summed as (
  select
    b.run, b.layer,
    cast(sum(b.repeated) as double) / nullif(cast(sum(b.of_pairs) as double), 0)
      as repeated_share,
    sum(cast(b.chosen as double) * b.chosen) / t.tokens / sum(b.chosen) as chance
  from by_expert as b
  join totals as t on t.run = b.run and t.layer = b.layer
  group by b.run, b.layer, t.tokens
)
select
  t.run, t.layer, t.pairs, s.repeated_share, s.chance, s.repeated_share / s.chance as lift
from totals as t
left join summed as s on s.run = t.run and s.layer = t.layer
where t.pairs > 0
order by t.run, t.layer
