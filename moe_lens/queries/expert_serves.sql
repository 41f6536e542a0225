-- What one expert serves: where in a sequence, and which vocabulary ids.
-- A row is one value of a kind: `position`, the first of `width` positions, in their order; or `token id`,
-- by share. tokens: valid tokens with this value that were routed in the layer; chosen: those of them
-- that chose the expert; share = chosen / tokens (0 to 1); overall_share is the same over all values of
-- the kind, lift = share / overall_share (1: the value is nothing to the expert). From kept rows; ids
-- need token_ids=True when recording. Few choices make large lifts by chance: min_times.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $rank int = null: only this rank
-- $layer int = 0: layer of the expert
-- $expert int = 0: which expert
-- $width int = 16 (1 or more): positions per bucket
-- $top int = 20: token ids
-- $min_times int = 5: choices below which a token id does not appear, where any has so many
with placed as (
  -- The layers first: which stream they are of is then no key of the large join.
  select
    t.run, t.rank, t.attempt, t.step, t.forward, t.token, t.token_id,
    t.position - t.position % $width as position
  from tokens as t
  join moe_layers as m on m.run = t.run and m.stream = t.stream
  where m.layer = $layer
    and not t.padding
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
),
served as materialized (
  -- Materialized: read once for both kinds, and not grouped by every token below the join.
  select
    p.run, p.position, p.token_id,
    case when array_contains(r.expert_ids, $expert) then 1 else 0 end as here
  from routing as r
  join placed as p
    on p.run = r.run and p.rank = r.rank and p.attempt = r.attempt and p.step = r.step
    and p.forward = r.forward and p.token = r.token
  where r.layer = $layer
),
counted as (
  select run, 'position' as kind, position as value, count(*) as tokens, sum(here) as chosen
  from served
  group by run, position
  union all
  select run, 'token id', token_id, count(*), sum(here)
  from served
  where token_id is not null
  group by run, token_id
),
shared as (
  select
    run, kind, value, tokens, cast(chosen as bigint) as chosen,
    cast(chosen as double) / tokens as share,
    cast(sum(chosen) over (partition by run, kind) as double)
      / sum(tokens) over (partition by run, kind) as overall_share,
    least($min_times, max(chosen) over (partition by run, kind)) as enough
  from counted
),
ranked as (
  select
    *,
    row_number() over (
      partition by run, kind
      order by
        case when kind = 'position' then value end,
        share desc, chosen desc, value
    ) as place
  from shared
  where kind = 'position' or (chosen >= enough and chosen > 0)
)
select
  run, kind, value, tokens, chosen, share, overall_share,
  share / nullif(overall_share, 0) as lift
from ranked
where kind = 'position' or place <= $top
order by run, kind, place
