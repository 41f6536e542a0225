"""Write the numbers of the newest results into README.md, below its heading `## Numbers`.

python benchmarks/_readme.py
"""

from __future__ import annotations

import json
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
    lines = [HEADING, "The newest files in `results/`, put here by `benchmarks/_readme.py`.\n"]
    lines += ["| gate | measured | bound | | date |", "|---|---|---|---|---|"]
    for result in results:
        for gate in result["gates"]:
            verdict = "ok" if gate["passed"] else "**missed**"
            measured, bound, day = f"{gate['value']:.4g}", gate["bound"], result["date"][:10]
            lines.append(f"| {gate['name']} | {measured} | {bound} | {verdict} | {day} |")
    found = {f"{r['machine']['cpu']}, {r['machine']['cores']} cores" for r in results}
    packages = {k: v for r in results for k, v in r["versions"].items()}
    shown = ", ".join(f"{name} {version}" for name, version in packages.items())
    return "\n".join([*lines, f"\nTaken on {' and '.join(sorted(found))}; {shown}.\n"])


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8").partition(HEADING)[0].rstrip()
    README.write_text(f"{before}\n\n{markdown(newest())}", encoding="utf-8")
