-- Where the kept rows of each sequence begin and end: a row a stream and sequence.
-- first_position above 0: its first tokens have no rows, as of a beam that branched off later. tokens:
-- distinct positions. Padding is left out.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
select
  t.run, t.rank, t.stream, t.sequence,
  min(t.position) as first_position,
  max(t.position) as last_position,
  count(distinct t.position) as tokens
from tokens as t
where not t.padding
  and ($first_step is null or t.step >= $first_step)
  and ($last_step is null or t.step <= $last_step)
  and ($tag is null or t.tag = $tag)
  and ($rank is null or t.rank = $rank)
  and (
    $phase is null
    or exists (
      select 1 from steps as f
      where f.run = t.run and f.rank = t.rank and f.step = t.step and f.forward = t.forward
        and f.phase = $phase
    )
  )
group by t.run, t.rank, t.stream, t.sequence
order by t.run, t.rank, t.stream, t.sequence
