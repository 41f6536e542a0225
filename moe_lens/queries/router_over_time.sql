-- How sure the router is over time, per layer: means over valid tokens with finite logits.
-- The columns are those of router_confidence. A window of several steps counts at its first.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $every int = 1 (1 or more): steps per bucket
-- $by_tag bool = false: one row per tag; false: all tags together, as tag 'all'
with finite as (
  select
    run, step - step % $every as step, layer, case when $by_tag then tag else 'all' end as tag,
    cast(tokens - nonfinite_tokens as double) as tokens,
    cast(entropy_sum as double) as entropy_sum, cast(margin_sum as double) as margin_sum,
    cast(top1_prob_sum as double) as top1_prob_sum, cast(zloss_sum as double) as zloss_sum
  from routers
  where ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
),
summed as (
  select
    run, step, layer, tag,
    cast(sum(tokens) as bigint) as tokens,
    sum(entropy_sum) / nullif(sum(case when entropy_sum is not null then tokens end), 0)
      as entropy,
    sum(margin_sum) / nullif(sum(case when margin_sum is not null then tokens end), 0) as margin,
    sum(top1_prob_sum) / nullif(sum(case when top1_prob_sum is not null then tokens end), 0)
      as top1_prob,
    sum(zloss_sum) / nullif(sum(case when zloss_sum is not null then tokens end), 0) as zloss
  from finite
  group by run, step, layer, tag
)
select
  s.run, s.step, s.layer, s.tag, s.tokens, s.entropy,
  case when m.experts + m.zero_experts > 1 then s.entropy / ln(m.experts + m.zero_experts) end
    as entropy_norm,
  s.margin, s.top1_prob, s.zloss
from summed as s
left join moe_layers as m on m.run = s.run and m.layer = s.layer
order by s.run, s.step, s.layer, s.tag
