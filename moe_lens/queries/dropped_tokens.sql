-- Choices that found their expert full, and tokens that no expert served, per layer and tag.
-- overflow_rate and dropped_rate are over routed choices, unserved_rate over tokens (all 0 to 1).
-- An overflowed choice is either dropped or moved to another expert. Of an imported run it is not known
-- what was dropped: 0 says nothing there.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $by_tag bool = true: one row per tag; false: all tags together, as tag 'all'
with choices as (
  select
    run, layer, case when $by_tag then tag else 'all' end as tag,
    sum(routed) as routed, sum(processed) as processed,
    sum(overflowed) as overflowed, sum(dropped) as dropped, sum(rerouted_in) as rerouted_in
  from load_between($first_step, $last_step)
  where ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by 1, 2, 3
),
served as (
  select
    run, layer, case when $by_tag then tag else 'all' end as tag,
    sum(tokens) as tokens, sum(unserved_tokens) as unserved_tokens
  from routers
  where ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($phase is null or phase = $phase)
    and ($tag is null or tag = $tag)
    and ($rank is null or rank = $rank)
    and ($first_layer is null or layer >= $first_layer)
    and ($last_layer is null or layer <= $last_layer)
  group by 1, 2, 3
)
select
  coalesce(c.run, s.run) as run,
  coalesce(c.layer, s.layer) as layer,
  coalesce(c.tag, s.tag) as tag,
  cast(coalesce(s.tokens, 0) as bigint) as tokens,
  cast(coalesce(c.routed, 0) as bigint) as routed,
  cast(coalesce(c.processed, 0) as bigint) as processed,
  cast(coalesce(c.overflowed, 0) as bigint) as overflowed,
  cast(coalesce(c.dropped, 0) as bigint) as dropped,
  cast(coalesce(c.rerouted_in, 0) as bigint) as rerouted_in,
  cast(coalesce(s.unserved_tokens, 0) as bigint) as unserved_tokens,
  cast(c.overflowed as double) / nullif(cast(c.routed as double), 0) as overflow_rate,
  cast(c.dropped as double) / nullif(cast(c.routed as double), 0) as dropped_rate,
  cast(s.unserved_tokens as double) / nullif(cast(s.tokens as double), 0) as unserved_rate
from choices as c
full join served as s on s.run = c.run and s.layer = c.layer and s.tag = c.tag
order by 1, 2, 3
