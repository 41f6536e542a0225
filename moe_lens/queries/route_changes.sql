-- What it costs to take the runner-up in the last place, and more or fewer experts, per layer.
-- All tokens at once, one layer at a time. intervention: runner_up, or top_k with k as its number; cost:
-- mean of the loss under the change minus the loss without it, its standard error over sequences beside
-- it; worse: share of tokens whose loss rose; own: K, of the router itself. Written by moe-lens
-- counterfactual; as `route_changes` of moe_lens.metrics.counterfactual.
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $tag text = null: only this tag
-- $result text = null: only this result; null: all
with sums as (
  select
    run, result, layer, intervention, number, sequence,
    count(*) as n,
    sum(base_loss) as loss,
    sum(loss - base_loss) as total,
    sum(case when loss > base_loss then 1 else 0 end) as worse
  from counterfactual
  where intervention in ('runner_up', 'top_k')
    and ($result is null or result = $result)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
    and ($tag is null or tag = $tag)
  group by run, result, layer, intervention, number, sequence
),
means as (
  select
    *,
    sum(n) over of_change as tokens,
    sum(total) over of_change / sum(n) over of_change as mean,
    count(*) over of_change as sequences
  from sums
  window of_change as (partition by run, result, layer, intervention, number)
)
select
  x.run, x.result, x.layer, x.intervention, x.number,
  max(m.top_k) as own,
  cast(max(x.tokens) as bigint) as tokens,
  sum(x.loss) / max(x.tokens) as loss,
  max(x.mean) as cost,
  case when max(x.sequences) > 1 then
    sqrt(
      max(x.sequences) / (max(x.sequences) - 1)
      * sum((x.total - x.n * x.mean) * (x.total - x.n * x.mean))
    ) / max(x.tokens)
  end as cost_error,
  sum(x.worse) / max(x.tokens) as worse
from means as x
left join moe_layers as m on m.run = x.run and m.layer = x.layer
group by x.run, x.result, x.layer, x.intervention, x.number
order by x.run, x.result, x.layer, x.intervention, x.number
