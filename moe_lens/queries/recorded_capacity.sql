-- The capacity factor that was in force, per layer, in the unit of capacity_sweep.
-- capacity_factor = sum of capacity x experts / sum of tokens x k, over the forwards of each rank;
-- lowest and highest are those of single forwards. Tokens are valid ones: where padding took room too,
-- this is more than what the model was configured with. Only windows of one forward whose capacity
-- was of the whole forward count: layers without a capacity (dropless), without a fixed k, or with a
-- capacity for each of several sequences (adapters switch and gshard) have no row.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
with sized as (
  select
    l.run, l.layer,
    cast(l.capacity as double) * m.experts as slots,
    cast(l.tokens as double) * m.top_k as choices
  from layers as l
  join moe_layers as m on m.run = l.run and m.layer = l.layer
  where l.forwards = 1 and l.capacity is not null and l.tokens > 0
    and m.top_k is not null and m.adapter not in ('switch', 'gshard')
    and ($first_step is null or l.step >= $first_step)
    and ($last_step is null or l.step <= $last_step)
    and ($phase is null or l.phase = $phase)
    and ($rank is null or l.rank = $rank)
    and ($first_layer is null or l.layer >= $first_layer)
    and ($last_layer is null or l.layer <= $last_layer)
)
select
  run, layer, count(*) as forwards,
  sum(slots) / sum(choices) as capacity_factor,
  min(slots / choices) as lowest,
  max(slots / choices) as highest
from sized
group by run, layer
order by run, layer
