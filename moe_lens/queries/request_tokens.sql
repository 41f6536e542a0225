-- One sequence token by token: what each layer's router decided, and what became of it.
-- A row is a token and a layer; a position that was routed again (another forward) has further rows.
-- dropped: slots of expert_ids that no expert computed, null where none; entropy in nats, margin in the
-- unit of the selection score (null where the router has none); loss of the prediction made at this
-- position, in the user's unit. Padding and rejected drafts are left out.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $tag text = null: only this tag
-- $first_layer int = null: first layer that counts
-- $last_layer int = null: last layer that counts
-- $rank int = 0: the sequence's rank
-- $sequence int = 0: which sequence
with outcome as (
  select
    run, step, forward, position,
    avg(cast(loss as double)) as loss,
    max(case when not kept then 1 else 0 end) as rejected
  from outcomes
  where rank = $rank and sequence = $sequence
  group by run, step, forward, position
),
valid as (
  select
    t.run, t.attempt, t.step, t.forward, t.stream, t.token, t.position, t.token_id,
    case when t.stream in ('main', 'decoder') then o.loss end as loss
  from tokens as t
  left join outcome as o
    on o.run = t.run and o.step = t.step and o.forward = t.forward and o.position = t.position
    and t.stream <> 'encoder'
  where t.rank = $rank
    and t.sequence = $sequence
    and not t.padding
    and coalesce(o.rejected, 0) = 0
    and ($first_step is null or t.step >= $first_step)
    and ($last_step is null or t.step <= $last_step)
    and ($tag is null or t.tag = $tag)
    and (
      $phase is null
      or exists (
        select 1 from steps as f
        where f.run = t.run and f.rank = t.rank and f.step = t.step and f.forward = t.forward
          and f.phase = $phase
      )
    )
)
select
  v.run, v.position, v.token_id, r.layer, r.expert_ids, r.dropped, r.entropy, r.margin, v.loss
from routing as r
join moe_layers as m on m.run = r.run and m.layer = r.layer
join valid as v
  on v.run = r.run and v.attempt = r.attempt and v.step = r.step and v.forward = r.forward
  and v.token = r.token and v.stream = m.stream
where r.rank = $rank
  and ($first_layer is null or r.layer >= $first_layer)
  and ($last_layer is null or r.layer <= $last_layer)
  and ($first_layer is null or m.layer >= $first_layer)
  and ($last_layer is null or m.layer <= $last_layer)
order by v.run, v.position, r.layer, v.step, v.forward
