-- Loss, drops and the router's certainty side by side, by tag.
-- loss is the mean over loss_tokens, in the unit given to rec.loss. dropped_rate is over routed
-- choices; unserved_rate (no expert ran) and entropy_norm over tokens in every layer. entropy_norm is
-- the router's entropy over ln E (0: certain; 1: undecided), zero-compute experts among E. Layers
-- narrow these three, not loss and tokens. Null where nothing was recorded. Of an imported run it is not
-- known what was dropped: 0 says nothing there.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
with sliced as (
  select
    run, tag, sum(tokens) as tokens, sum(loss_tokens) as loss_tokens,
    sum(cast(loss_sum as double)) as loss_sum
  from slices
  where ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
  group by run, tag
),
choices as (
  select run, tag, sum(routed) as routed, sum(dropped) as dropped
  from load_between($first_step, $last_step)
  where ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, tag
),
by_layer as (
  select
    run, tag, layer,
    sum(tokens) as tokens, sum(unserved_tokens) as unserved_tokens,
    sum(cast(entropy_sum as double)) as entropy_sum,
    sum(case when entropy_sum is not null then tokens - nonfinite_tokens end) as entropy_tokens
  from routers
  where ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, tag, layer
),
routed_tokens as (
  select
    r.run, r.tag,
    cast(sum(r.tokens) as double) as tokens,
    cast(sum(r.unserved_tokens) as double) as unserved_tokens,
    sum(case when m.experts + m.zero_experts > 1
      then r.entropy_sum / ln(m.experts + m.zero_experts) end) as entropy_norm_sum,
    cast(sum(case when m.experts + m.zero_experts > 1 then r.entropy_tokens end) as double)
      as entropy_tokens
  from by_layer as r
  left join moe_layers as m on m.run = r.run and m.layer = r.layer
  group by r.run, r.tag
),
tags as (
  select run, tag from sliced
  union
  select run, tag from choices
  union
  select run, tag from routed_tokens
)
select
  t.run, t.tag,
  cast(coalesce(s.tokens, 0) as bigint) as tokens,
  cast(coalesce(s.loss_tokens, 0) as bigint) as loss_tokens,
  s.loss_sum / nullif(cast(s.loss_tokens as double), 0) as loss,
  cast(c.dropped as double) / nullif(cast(c.routed as double), 0) as dropped_rate,
  r.unserved_tokens / nullif(r.tokens, 0) as unserved_rate,
  r.entropy_norm_sum / nullif(r.entropy_tokens, 0) as entropy_norm
from tags as t
left join sliced as s on s.run = t.run and s.tag = t.tag
left join choices as c on c.run = t.run and c.tag = t.tag
left join routed_tokens as r on r.run = t.run and r.tag = t.tag
order by t.run, t.tag
