-- The newest minutes of a run: which steps they are, how fast they went, what capture lost.
-- The minutes count back from the newest forward's start. tokens_per_second is over the wall time from
-- the first of these forwards to the end of the last, of all ranks together. A run without times (most
-- that were imported) has no row.
-- $phase text = null: only this phase
-- $rank int = null: only this rank
-- $minutes float = 5 (0 or more): minutes up to the newest forward
with chosen as (
  select run, step, tokens, lost_rows, breaches, t_start_ns, t_start_ns + host_ns as t_end_ns
  from steps
  where t_start_ns is not null
    and ($phase is null or phase = $phase)
    and ($rank is null or rank = $rank)
),
newest as (
  select run, max(t_start_ns) as t_start_ns from chosen group by run
)
select
  c.run,
  min(c.step) as first_step,
  max(c.step) as last_step,
  count(*) as forwards,
  cast(sum(c.tokens) as bigint) as tokens,
  cast(max(c.t_end_ns) - min(c.t_start_ns) as double) / 1e9 as seconds,
  cast(sum(c.tokens) as double) * 1e9
    / nullif(cast(max(c.t_end_ns) - min(c.t_start_ns) as double), 0) as tokens_per_second,
  cast(sum(c.lost_rows) as bigint) as lost_rows,
  cast(sum(c.breaches) as bigint) as breaches
from chosen as c
join newest as n on n.run = c.run
where cast(n.t_start_ns - c.t_start_ns as double) <= $minutes * 6e10
group by c.run
order by c.run
