-- Experts that nobody chooses (dead), or below 10 % of the fair share (dormant).
-- Only layers in which enough tokens were routed to say so: tokens_needed = ln(E/0.001) / -ln(1 - k/E),
-- with which an unbiased router leaves any of E experts out with a chance of 0.1 %; layer_balance has
-- the tokens of every layer. ratio is over the mean expert. last_step: the last step up to $last_step,
-- of the whole run, that chose it (null: none did), so that a dead expert says since when (without
-- that bound: to within 64 windows on long runs).
-- Zero-compute experts (ids from `experts` upward) are left out.
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
chosen as (
  select run, layer, expert, max(last_step) as last_step
  from load_between(null, $last_step)
  where routed > 0
    and ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by run, layer, expert
),
routed_tokens as (
  select run, layer, cast(sum(tokens) as double) as tokens
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
wanted as (
  select m.run, m.layer, m.experts, t.tokens, unnest(range(m.experts)) as expert
  from moe_layers as m
  join routed_tokens as t on t.run = m.run and t.layer = m.layer
),
filled as (
  select
    w.run, w.layer, w.expert, w.experts, w.tokens, c.last_step,
    cast(coalesce(l.routed, 0) as double) as routed,
    sum(cast(coalesce(l.routed, 0) as double)) over (partition by w.run, w.layer) as assignments
  from wanted as w
  left join loads as l on l.run = w.run and l.layer = w.layer and l.expert = w.expert
  left join chosen as c on c.run = w.run and c.layer = w.layer and c.expert = w.expert
),
judged as (
  select
    *,
    case
      when assignments >= tokens * experts then 1e0
      else ceil(ln(experts / 1e-3) / -ln(1 - assignments / tokens / experts))
    end as tokens_needed
  from filled
  where assignments > 0 and tokens > 0
)
select
  run, layer, expert,
  case when routed = 0 then 'dead' else 'dormant' end as state,
  cast(routed as bigint) as routed,
  routed * experts / assignments as ratio,
  cast(tokens as bigint) as tokens,
  cast(tokens_needed as bigint) as tokens_needed,
  last_step
from judged
where tokens >= tokens_needed and routed * experts * 10 < assignments
order by run, layer, expert
