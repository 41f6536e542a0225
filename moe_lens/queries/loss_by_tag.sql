-- Loss and volume by phase and tag; loss is the mean over loss_tokens, in the unit given to rec.loss.
-- Null where no loss was given.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
select
  run, phase, tag,
  cast(sum(tokens) as bigint) as tokens,
  cast(sum(sequences) as bigint) as sequences,
  cast(sum(loss_tokens) as bigint) as loss_tokens,
  sum(cast(loss_sum as double)) / nullif(cast(sum(loss_tokens) as double), 0) as loss
from slices
where ($first_step is null or step >= $first_step)
  and ($last_step is null or step <= $last_step)
  and ($phase is null or phase = $phase)
  and ($tag is null or tag = $tag)
  and ($rank is null or rank = $rank)
group by run, phase, tag
order by run, phase, tag
