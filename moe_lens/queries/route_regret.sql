-- Whether other sets of as many experts would have served tokens better than the router's.
-- Of tokens of which other routes were measured, one at a time. regret: the loss minus the least of the
-- drawn routes. A least of several flatters, so beside it stand: random_regret, that of one drawn route
-- against the others; mean_route, their mean loss minus the router's; rank of the router's route among all
-- routes + 1 (1 is best; middle_rank: of a router that draws); beats, the share of drawn routes that are
-- worse. Errors are standard errors over sequences. margin and entropy: quarters of each layer's tokens,
-- the least first, from `least` to `most`. layer -1: all layers. Written by moe-lens counterfactual; as
-- `route_regret` of moe_lens.metrics.counterfactual.
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $tag text = null: only this tag
-- $result text = null: only this result; null: all
-- $by text = all (all or margin or entropy or tag): what tokens are sliced by
-- $together bool = false: all layers in one
with placed as (
  select
    *,
    row_number() over (
      partition by run, result, layer, sequence, position order by loss, number
    ) as place
  from counterfactual
  where intervention = 'other_route'
    and ($result is null or result = $result)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
    and ($tag is null or tag = $tag)
),
routed as (
  select
    run, result, layer, sequence, position,
    max(tag) as tag,
    max(case $by when 'margin' then cast(margin as double)
                 when 'entropy' then cast(entropy as double) end) as value,
    max(base_loss) as own,
    count(*) as routes,
    min(loss) as least_loss,
    max(case when place = 2 then loss end) as second_loss,
    avg(loss) as mean_loss,
    sum(case when loss < base_loss then 1.0 when loss = base_loss then 0.5 else 0.0 end) as below
  from placed
  group by run, result, layer, sequence, position
),
quarters as (
  select
    run, result, layer,
    quantile_cont(value, 0.25) as q1, quantile_cont(value, 0.5) as q2,
    quantile_cont(value, 0.75) as q3
  from routed
  group by run, result, layer
),
tokens as (
  select
    r.run, r.result, r.sequence, r.routes, r.value,
    case when $together then -1 else r.layer end as layer,
    case
      when $by = 'all' then 'all'
      when $by = 'tag' then r.tag
      when r.value is null then $by || ' unknown'
      else $by || ' ' || (
        1 + case when r.value >= q.q1 then 1 else 0 end + case when r.value >= q.q2 then 1 else 0 end
        + case when r.value >= q.q3 then 1 else 0 end
      ) || ' of 4'
    end as slice,
    r.own as loss,
    r.own - r.least_loss as regret,
    r.mean_loss - r.own as mean_route,
    1 + r.below as rank,
    1 - r.below / r.routes as beats,
    r.mean_loss - ((r.routes - 1) * r.least_loss + r.second_loss) / r.routes as random_regret
  from routed as r
  join quarters as q on q.run = r.run and q.result = r.result and q.layer = r.layer
),
means as (
  select
    run, result, layer, slice,
    min(value) as least,
    max(value) as most,
    count(*) as tokens,
    count(distinct sequence) as sequences,
    avg(loss) as loss,
    avg(routes) as routes,
    avg(regret) as regret,
    avg(case when regret > 0 then 1.0 else 0.0 end) as positive,
    avg(random_regret) as random_regret,
    avg(mean_route) as mean_route,
    avg(rank) as rank,
    (avg(routes) + 2) / 2 as middle_rank,
    avg(beats) as beats
  from tokens
  group by run, result, layer, slice
),
sums as (
  select
    t.run, t.result, t.layer, t.slice, t.sequence,
    sum(t.regret - m.regret) as regret, sum(t.beats - m.beats) as beats
  from tokens as t
  join means as m
    on m.run = t.run and m.result = t.result and m.layer = t.layer and m.slice = t.slice
  group by t.run, t.result, t.layer, t.slice, t.sequence
),
spread as (
  select
    run, result, layer, slice,
    sqrt(sum(regret * regret)) as regret, sqrt(sum(beats * beats)) as beats
  from sums
  group by run, result, layer, slice
)
select
  m.run, m.result, m.layer, m.slice, m.least, m.most, m.tokens, m.loss, m.routes, m.regret,
  case when m.sequences > 1
    then s.regret * sqrt(m.sequences / (m.sequences - 1)) / m.tokens end as regret_error,
  m.positive, m.random_regret, m.mean_route, m.rank, m.middle_rank, m.beats,
  case when m.sequences > 1
    then s.beats * sqrt(m.sequences / (m.sequences - 1)) / m.tokens end as beats_error
from means as m
join spread as s
  on s.run = m.run and s.result = m.result and s.layer = m.layer and s.slice = m.slice
order by m.run, m.result, m.layer, m.slice
