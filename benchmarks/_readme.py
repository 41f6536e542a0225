"""Write the numbers of the newest results into README.md, below its heading `## Numbers`.

python benchmarks/_readme.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from _common import RESULTS

README = RESULTS.parent / "README.md"
HEADING = "## Numbers\n"


def newest() -> list[dict[str, Any]]:
    """The last result of each script, by the script's name."""
    files = sorted(RESULTS.glob("*.json"))
    by_script = {p.name.rpartition("-20")[0]: p for p in files}
    return [json.loads(p.read_text(encoding="utf-8")) for _, p in sorted(by_script.items())]


def markdown(results: list[dict[str, Any]]) -> str:
    """The gates, a table for each machine."""
    lines = [HEADING, "The newest files in `results/`, put here by `benchmarks/_readme.py`."]
    for machine in dict.fromkeys(map(_machine, results)):
        lines += ["", *_table(machine, [r for r in results if _machine(r) == machine])]
    return "\n".join([*lines, ""])


def _machine(result: dict[str, Any]) -> str:
    said = result["machine"]
    gpu = said.get("device_name")
    return f"{f'{gpu}, ' if gpu else ''}{said['cpu']}, {said['cores']} cores"


def _table(machine: str, results: list[dict[str, Any]]) -> Iterator[str]:
    packages = {k: v for r in results for k, v in r["versions"].items()}
    shown = ", ".join(f"{name} {version}" for name, version in packages.items())
    yield f"On {machine}; {shown}:\n"
    yield "| gate | measured | bound | | date |\n|---|---|---|---|---|"
    for result in results:
        for gate in result["gates"]:
            verdict = "ok" if gate["passed"] else "**missed**"
            measured, bound, day = f"{gate['value']:.4g}", gate["bound"], result["date"][:10]
            yield f"| {gate['name']} | {measured} | {bound} | {verdict} | {day} |"


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8").partition(HEADING)[0].rstrip()
    README.write_text(f"{before}\n\n{markdown(newest())}", encoding="utf-8")
