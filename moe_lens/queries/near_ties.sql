-- How many tokens were nearly routed elsewhere: the distribution of the margin, per layer.
-- margin is the k-th minus the next selection score, in the unit of that score (moe_layers.selection).
-- Bins are half decades: low = 10^(n/2) <= margin < high = 10^((n+1)/2). The first takes all below
-- 10^-7.5 (low 0), the last all from 10^1.5 (high null); bins without a token have no row. share is of
-- the layer's tokens with a margin. Two engines, or two precisions, flip tokens whose margin is about
-- their arithmetic difference. From kept rows; padding, and tokens without a margin, count nowhere.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
with excluded as (
  -- Left out by a join that finds nothing: most often these are few, and all others are many.
  select t.run, t.rank, t.attempt, t.step, t.forward, t.stream, t.token
  from tokens as t
  where (
      t.padding
      or ($tag is not null and t.tag <> $tag)
      or (
        $phase is not null
        and not exists (
          select 1 from steps as f
          where f.run = t.run and f.rank = t.rank and f.step = t.step and f.forward = t.forward
            and f.phase = $phase
        )
      )
    )
    and ($first_step is null or t.step >= $first_step)
    and ($last_step is null or t.step <= $last_step)
    and ($rank is null or t.rank = $rank)
),
binned as (
  select
    r.run, r.layer,
    case
      when r.margin <= 0 then -16
      else least(3, greatest(-16, floor(2 * log10(cast(r.margin as double)))))
    end as bin
  from routing as r
  join moe_layers as m on m.run = r.run and m.layer = r.layer
  left join excluded as x
    on x.run = r.run and x.rank = r.rank and x.attempt = r.attempt and x.step = r.step
    and x.forward = r.forward and x.stream = m.stream and x.token = r.token
  where ($first_layer is null or r.layer >= $first_layer)
    and ($last_layer is null or r.layer <= $last_layer)
    and ($first_layer is null or m.layer >= $first_layer)
    and ($last_layer is null or m.layer <= $last_layer)
    and x.run is null
    and r.margin is not null
    and ($first_step is null or r.step >= $first_step)
    and ($last_step is null or r.step <= $last_step)
    and ($rank is null or r.rank = $rank)
),
counted as (
  select run, layer, bin, count(*) as tokens from binned group by run, layer, bin
)
select
  run, layer,
  case when bin = -16 then 0e0 else power(1e1, bin / 2e0) end as low,
  case when bin < 3 then power(1e1, (bin + 1) / 2e0) end as high,
  tokens,
  cast(tokens as double) / sum(tokens) over (partition by run, layer) as share
from counted
order by run, layer, bin
