-- The forwards that took longest beside others of their phase.
-- A forward's time is device_ms where it was measured, else host_ms. times_median is over the median of
-- the phase's forwards that were timed the same way (1: a usual one), which the list is sorted by.
-- us_per_token is over valid tokens, in microseconds. Forwards without a time (most imported runs have
-- none) are left out.
-- $first_step int = null: first step that counts
-- $last_step int = null: last step that counts
-- $phase text = null: only this phase
-- $rank int = null: only this rank
-- $top int = 20 (1 or more): forwards
with timed as (
  select
    run, rank, step, forward, phase, tokens, host_ns, device_ns,
    case when device_ns is null then 'host' else 'device' end as clock,
    cast(coalesce(device_ns, host_ns) as double) as ns
  from steps
  where coalesce(device_ns, host_ns) is not null
    and ($first_step is null or step >= $first_step)
    and ($last_step is null or step <= $last_step)
    and ($phase is null or phase = $phase)
    and ($rank is null or rank = $rank)
),
usual as (
  select run, phase, clock, median(ns) as ns from timed group by run, phase, clock
),
compared as (
  select
    t.run, t.rank, t.step, t.forward, t.phase, t.tokens,
    cast(t.host_ns as double) / 1e6 as host_ms, cast(t.device_ns as double) / 1e6 as device_ms,
    t.ns / nullif(cast(t.tokens as double), 0) / 1e3 as us_per_token,
    t.ns / nullif(u.ns, 0) as times_median, t.ns
  from timed as t
  join usual as u on u.run = t.run and u.phase = t.phase and u.clock = t.clock
),
ranked as (
  select
    *,
    row_number() over (
      partition by run
      order by coalesce(times_median, 0) desc, ns desc, rank, step, forward
    ) as place
  from compared
)
select
  run, rank, step, forward, phase, tokens, host_ms, device_ms, us_per_token, times_median
from ranked
where place <= $top
order by run, place
