-- What each run holds in total: steps, forwards, tokens, kept rows, losses and breaches of capture.
with counted as (
  select
    run,
    count(distinct step) as steps,
    count(*) as forwards,
    min(step) as first_step,
    max(step) as last_step,
    cast(sum(tokens) as bigint) as tokens,
    cast(sum(padding_tokens) as bigint) as padding_tokens,
    cast(sum(lost_rows) as bigint) as lost_rows,
    cast(sum(breaches) as bigint) as breaches,
    cast(sum(fires_expected) as bigint) as fires_expected,
    cast(sum(fires_seen) as bigint) as fires_seen,
    string_agg(distinct phase, chr(10) order by phase) as phases
  from steps
  group by run
),
kept as (
  select run, count(*) as token_rows from tokens group by run
)
select
  names.run, counted.steps, counted.forwards, counted.first_step, counted.last_step, counted.tokens,
  counted.padding_tokens, counted.lost_rows, counted.breaches, counted.fires_expected,
  counted.fires_seen, counted.phases, coalesce(kept.token_rows, 0) as token_rows
from (select distinct run from runs) as names
left join counted on counted.run = names.run
left join kept on kept.run = names.run
order by names.run
