-- What each expert is worth to the loss, beside its load: knocked out, and forced in.
-- load: share of the measured tokens that choose it; fair: K / E. knock_out: mean cost (the loss under
-- the change minus the loss without it) of leaving it out, over all tokens; knock_out_used: over those
-- that chose it; force_in: of putting it in the last place of all others. Errors are standard errors over
-- sequences, null of fewer than two. dormant: load below a quarter of fair; dormant_but_causal: dormant,
-- and knock_out_used, or the size of force_in, is above twice its layer's median and beyond three errors.
-- Written by moe-lens counterfactual; as `expert_importance` of moe_lens.metrics.counterfactual.
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $tag text = null: only this tag
-- $result text = null: only this result; null: all
with costs as (
  select
    run, result, layer, number as expert, intervention, sequence, affected, loss - base_loss as cost
  from counterfactual
  where intervention in ('knock_out', 'force_in')
    and ($result is null or result = $result)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
    and ($tag is null or tag = $tag)
),
loads as (
  select
    run, result, layer, expert,
    coalesce(
      avg(case when intervention = 'knock_out' then cast(affected as double) end),
      1 - avg(case when intervention = 'force_in' then cast(affected as double) end)
    ) as load
  from costs
  group by run, result, layer, expert
),
kinds as (
  select run, result, layer, expert, intervention as kind, sequence, cost from costs
  union all
  select run, result, layer, expert, 'knock_out_used' as kind, sequence, cost
  from costs
  where intervention = 'knock_out' and affected
),
sums as (
  select run, result, layer, expert, kind, sequence, count(*) as n, sum(cost) as total
  from kinds
  group by run, result, layer, expert, kind, sequence
),
means as (
  select
    *,
    sum(n) over of_kind as tokens,
    sum(total) over of_kind / sum(n) over of_kind as mean,
    count(*) over of_kind as sequences
  from sums
  window of_kind as (partition by run, result, layer, expert, kind)
),
errors as (
  select
    run, result, layer, expert, kind, max(mean) as mean,
    case when max(sequences) > 1 then
      sqrt(
        max(sequences) / (max(sequences) - 1) * sum((total - n * mean) * (total - n * mean))
      ) / max(tokens)
    end as error
  from means
  group by run, result, layer, expert, kind
),
experts as (
  select
    run, result, layer, expert,
    max(case when kind = 'knock_out' then mean end) as knock_out,
    max(case when kind = 'knock_out' then error end) as knock_out_error,
    max(case when kind = 'knock_out_used' then mean end) as knock_out_used,
    max(case when kind = 'knock_out_used' then error end) as knock_out_used_error,
    max(case when kind = 'force_in' then mean end) as force_in,
    max(case when kind = 'force_in' then error end) as force_in_error
  from errors
  group by run, result, layer, expert
),
judged as (
  select
    e.*, l.load, cast(m.top_k as double) / (m.experts + m.zero_experts) as fair,
    median(e.knock_out_used) over of_layer as middle_used,
    median(abs(e.force_in)) over of_layer as middle_forced
  from experts as e
  join loads as l
    on l.run = e.run and l.result = e.result and l.layer = e.layer and l.expert = e.expert
  left join moe_layers as m on m.run = e.run and m.layer = e.layer
  window of_layer as (partition by e.run, e.result, e.layer)
)
select
  run, result, layer, expert, load, fair,
  knock_out, knock_out_error, knock_out_used, knock_out_used_error, force_in, force_in_error,
  coalesce(load < 0.25 * fair, false) as dormant,
  coalesce(load < 0.25 * fair, false) and (
    coalesce(knock_out_used > 2 * middle_used and knock_out_used > 3 * knock_out_used_error, false)
    or coalesce(abs(force_in) > 2 * middle_forced and abs(force_in) > 3 * force_in_error, false)
  ) as dormant_but_causal
from judged
order by run, result, layer, expert
