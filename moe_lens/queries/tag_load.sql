-- Load of each expert by tag, per layer: which experts a tag's tokens choose, and how often.
-- share is of the tag's tokens (they sum to k over experts; k/E: no preference), overall_share the same
-- over all tags' tokens; lift is their ratio (1: the tag uses the expert as all do). From counts of every
-- valid token. Experts that a tag never chose have a row; so have not tags without tokens. Zero-compute
-- experts (ids from `experts` upward) are left out.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
with tagged as (
  select run, layer, tag, sum(tokens) as tokens
  from routers
  where ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($phase is null or phase = $phase)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, layer, tag
),
wanted as (
  select
    t.run, t.layer, t.tag, t.tokens,
    sum(t.tokens) over (partition by t.run, t.layer) as all_tokens,
    m.experts
  from tagged as t
  join moe_layers as m on m.run = t.run and m.layer = t.layer
  where t.tokens > 0
),
counted as (
  select run, layer, tag, expert, sum(routed) as routed
  from load_between($first_step, $last_step)
  where ($phase is null or phase = $phase)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, layer, tag, expert
),
spread as (
  select run, layer, tag, tokens, all_tokens, unnest(range(experts)) as expert
  from wanted
),
filled as (
  select
    s.run, s.layer, s.tag, s.expert, s.tokens, s.all_tokens,
    coalesce(c.routed, 0) as routed,
    sum(coalesce(c.routed, 0)) over (partition by s.run, s.layer, s.expert) as all_routed
  from spread as s
  left join counted as c
    on c.run = s.run and c.layer = s.layer and c.tag = s.tag and c.expert = s.expert
),
shared as (
  select
    run, layer, tag, expert,
    cast(tokens as bigint) as tokens, cast(routed as bigint) as routed,
    cast(routed as double) / tokens as share,
    cast(all_routed as double) / all_tokens as overall_share
  from filled
)
select
  run, layer, tag, expert, tokens, routed, share, overall_share,
  share / nullif(overall_share, 0) as lift
from shared
where $tag is null or tag = $tag
order by run, layer, tag, expert
