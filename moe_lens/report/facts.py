"""The facts at the top of a report, what stands out, and whether the recording can be trusted."""

from __future__ import annotations

from moe_lens.lacking import not_there
from moe_lens.numbers import count, counted, digits, percent, times
from moe_lens.queries.info import size
from moe_lens.report.answers import Answers, total


def facts(answers: Answers) -> dict[str, str]:
    """What was recorded, and one line each on load and drops; those without text left out."""
    info = answers.info
    steps = f"{counted(info.steps, 'step')}, {counted(info.forwards, 'forward')}"
    if info.first_step is not None:
        steps += f" (steps {count(info.first_step)} to {count(info.last_step)})"
    if info.made_steps:
        steps += f"; {info.made_steps}"
    padding = total(answers.health, "padding_tokens")
    found = {
        "imported": info.imported,
        "model": info.model or "unnamed",
        "routers": info.shape,
        "groups": info.grouped,
        "shared weights": info.shared,
        "recorded": steps,
        "phases": ", ".join(_phases(answers)),
        "tokens": f"{count(total(answers.health, 'tokens'))} valid"
        + (f", {count(padding)} padding" if padding or not info.imported else "")
        + f"; {info.kept}",
        "lacks": "; ".join(f"{what}: {why}" for what, why in info.lacks.items()),
        "disk": size(sum(info.bytes.values())),
        "state": info.state,
        "load": _load(answers),
        "drops": _drops(answers),
        "tags": _tags(answers),
    }
    return {label: text for label, text in found.items() if text}


def checks(answers: Answers) -> list[tuple[bool, str]]:
    """One line a check: whether it is fine, and what it found."""
    info, rows = answers.info, answers.health
    forwards, breaches = counted(total(rows, "forwards"), "forward"), total(rows, "breaches")
    expected, seen = total(rows, "fires_expected"), total(rows, "fires_seen")
    lost = total(rows, "lost_rows")
    held = f"invariants hold in all of {forwards}"
    broke = f"{count(breaches)} breach{'es' * (breaches != 1)} of an invariant in {forwards}"
    blocks = f"routing seen in {count(seen)} of {count(expected)} MoE blocks entered"
    lines = [(breaches == 0, broke if breaches else held)]
    if info.imported:
        lines.append((True, f"imported whole from {info.imported}; nobody watched its recorder"))
    else:
        lines.append((expected == seen, blocks))
        lines.append((lost == 0, f"{count(lost)} per-token rows lost"))
    lines += [(False, f"{path} was hooked and never ran") for path in info.never_entered]
    if info.missing_ranks:
        ranks = ", ".join(map(str, info.missing_ranks))
        lines.append((False, f"ranks missing: {ranks}; counts lack them"))
    lines += [(False, f"{text} ({count(n)}×)") for text, n in info.warnings.items()]
    lines += [(False, f"{path} left out: {why}") for path, why in info.damaged.items()]
    for name, n in info.pruned.items():
        lines.append((True, f"{count(n)} rows of {name} removed to keep within max_bytes"))
    if info.error:
        lines.append((False, f"the recording ended with {info.error}"))
    return lines


def _phases(answers: Answers) -> list[str]:
    order = {phase: i for i, phase in enumerate(answers.phases)}
    rows = sorted(answers.health, key=lambda row: order.get(row["phase"], len(order)))
    return [f"{row['phase']} ({counted(row['forwards'], 'forward')})" for row in rows]


def _load(answers: Answers) -> str:
    chosen = [row for row in answers.load if row["ratio"]]
    if not chosen:
        return ""
    hottest = max(chosen, key=lambda row: row["ratio"])
    text = (
        f"hottest expert {times(hottest['ratio'])} the mean "
        f"(layer {hottest['layer']}, expert {hottest['expert']})"
    )
    judged = [row for row in answers.balance if row["dead_experts"] is not None]
    if judged:
        experts = count(total(judged, "experts"))
        text += f"; of {experts} experts {count(total(judged, 'dead_experts'))} dead, "
        text += f"{count(total(judged, 'dormant_experts'))} below 10 % of their share"
    return text


def _drops(answers: Answers) -> str:
    if not answers.info.knows_drops:
        return f"not known: {not_there(answers.info, 'drops')}"
    parts = []
    for phase, rows in answers.drops.items():
        routed = total(rows, "routed")
        if routed:
            parts.append(f"{phase} {percent(total(rows, 'dropped') / routed)}")
    return "" if not parts else "dropped choices: " + ", ".join(parts)


def _tags(answers: Answers) -> str:
    """Whether experts specialise by tag, beside tags permuted over the sequences."""
    most = answers.tells_tags
    if most is None or most.found.chance is None:
        return ""
    chance, value = most.found.chance, most.found.value
    text = (
        f"layer {most.layer} of {most.layers} tells them apart most: its experts carry "
        f"{digits(value)} nats of the tag, {digits(chance.expected)} by chance"
    )
    word = "above" if most.found.beyond == "high" else "not above"
    return (
        f"{text} ({word} all permutations of tags over sequences; {most.phase}, "
        f"{count(most.tokens)} tokens)"
    )
