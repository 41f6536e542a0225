-- Balance of each layer over its experts, from the router's choices by valid tokens.
-- max_over_mean: load of the hottest expert over the mean (1 to E/k); an unbiased router gives about
-- max_over_mean_floor by chance alone. load_entropy is in nats (0 to ln E), load_entropy_norm over
-- ln E, effective_experts its exponential. dead: experts that nobody chose; dormant: those below
-- 10 % of the fair share, dead ones included. Both are null while fewer than tokens_needed =
-- ln(E/0.001) / -ln(1 - k/E) tokens were routed, since so few may miss an expert by chance.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
with loads as (
  select run, layer, expert, sum(routed) as routed
  from load_between($first_step, $last_step)
  where ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, layer, expert
),
routed_tokens as (
  select run, layer, sum(tokens) as tokens
  from (
    select run, rank, step, phase, layer, tokens from layers where $tag is null
    union all
    select run, rank, step, phase, layer, tokens from routers where tag = $tag
  ) as counted
  where ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($phase is null or phase = $phase)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, layer
),
real as (
  select
    m.run, m.layer, m.experts, cast(l.routed as double) as routed,
    cast(sum(l.routed) over (partition by m.run, m.layer) as double) as assignments
  from moe_layers as m
  join loads as l on l.run = m.run and l.layer = m.layer and l.expert < m.experts
  where l.routed > 0
),
summed as (
  select
    run, layer,
    max(routed) as hottest,
    count(*) as chosen,
    sum(case when routed * experts * 10 < assignments then 1 else 0 end) as faint,
    -sum(routed / assignments * ln(routed / assignments)) as load_entropy,
    max(assignments) as assignments
  from real
  group by run, layer
),
known as (
  select
    m.run, m.layer, m.experts, cast(t.tokens as double) as tokens,
    s.hottest, s.chosen, s.faint, s.load_entropy, s.assignments,
    s.assignments / nullif(cast(t.tokens as double), 0) / m.experts as chance
  from moe_layers as m
  left join routed_tokens as t on t.run = m.run and t.layer = m.layer
  left join summed as s on s.run = m.run and s.layer = m.layer
  where ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
),
judged as (
  select
    *,
    case
      when chance >= 1 then 1e0
      else ceil(ln(experts / 1e-3) / -ln(1 - chance))
    end as tokens_needed
  from known
)
select
  run, layer, experts,
  cast(coalesce(tokens, 0) as bigint) as tokens,
  cast(coalesce(assignments, 0) as bigint) as assignments,
  hottest * experts / assignments as max_over_mean,
  case
    when chance < 1 then 1 + sqrt(2 * ln(experts) * (1 - chance) * experts / assignments)
    when chance >= 1 then 1e0
  end as max_over_mean_floor,
  load_entropy,
  case when experts > 1 then load_entropy / ln(experts) end as load_entropy_norm,
  exp(load_entropy) as effective_experts,
  cast(tokens_needed as bigint) as tokens_needed,
  case when tokens >= tokens_needed then experts - chosen end as dead_experts,
  case when tokens >= tokens_needed then cast(experts - chosen + faint as bigint) end
    as dormant_experts
from judged
order by run, layer
