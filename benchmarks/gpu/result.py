"""What the workers reported, as gates, tables and a JSON file.

Runs in the parent process, which never touches the GPU and needs neither torch nor CUDA.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _common import Report, machine, table

from moe_lens.replay import floors

KINDS = ("check", "race", "stages", "tiles", "checked", "absent", "waits", "note", "not_reached")
OURS = "ours auto"
GROUPED = "tf grouped_mm"
RIVALS = (GROUPED, "tf batched_mm", "tf eager", "tf compiled")
COLUMNS = {
    OURS: "ours",
    "ours grouped_mm": "gmm",
    "ours triton": "triton",
    GROUPED: "tf gmm",
    "tf compiled": "tf comp",
    "tf batched_mm": "tf bmm",
    "tf eager": "tf eager",
    "bare grouped_mm x2": "bare",
}
PREFILL_GATED = ("olmoe", "qwen3")
ROUTINGS = ("uniform", "zipf 1")
PLANNED_SLOTS = 32_768


@dataclass
class Result:
    """Everything that is known so far.

    Args:
        setup: How the race was asked for.
        gated: Whether this machine is the one that the gates are for (not a CPU).
    """

    setup: dict[str, Any]
    gated: bool
    numbers: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {kind: [] for kind in KINDS}
    )
    build: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    begun: datetime = field(default_factory=lambda: datetime.now(UTC))

    def take(self, event: dict[str, Any]) -> None:
        """One line of a worker."""
        kind = event.pop("kind")
        if kind in ("build", "ceilings"):
            setattr(self, kind, event)
        elif kind in self.numbers:
            self.numbers[kind].append(event)

    def done(self) -> list[str]:
        """Cases that have been measured."""
        cases = [e["case"] for kind in ("race", "stages", "tiles") for e in self.numbers[kind]]
        return cases + [e["what"] for e in self.numbers["check"]]

    # -- floors and gates -------------------------------------------------------------------------

    def floors_us(self, of: dict[str, Any]) -> dict[str, float]:
        """Floors of a case, in microseconds: its stages, all of them, and `fused`."""
        if not self.ceilings:
            return {}
        flops = self.ceilings["matmul_flop_per_s"]["bfloat16"]
        ceiling = floors.Ceiling(
            max(self.ceilings["copy_bytes_per_s"], self.ceilings["read_bytes_per_s"]), flops
        )
        s = of["shape"]
        shape = floors.Shape(s["experts"], s["hidden"], s["intermediate"], "bfloat16", 2)
        sizes = (of["tokens"], of["rows"], of["touched"], shape)
        found = {n: w.floor_ns(ceiling) / 1e3 for n, w in floors.stages(*sizes).items()}
        found["unfused"] = sum(found.values())
        found["fused"] = floors.fused(*sizes).floor_ns(ceiling) / 1e3
        return found

    def gates(self) -> tuple[Report, list[str]]:
        """What it must reach, as far as it was measured; and what was not."""
        report = Report("gpu/race", self.setup)
        bad = [c for c in self.numbers["check"] if not c["ok"]]
        bad += [c for c in self.numbers["checked"] if not c["ok"]]
        report.gate("checks that failed", len(bad), at_most=0)
        if not self.gated:
            return report, []
        for race in self.numbers["race"]:
            self._race_gates(report, race)
        for stages in self.numbers["stages"]:
            self._stage_gates(report, stages)
        reached = [gate["name"] for gate in report.gates] + [
            f"{race['case']}: race" for race in self.numbers["race"] if OURS in race["times"]
        ]
        missing = [w for w in self._wanted() if not any(name.startswith(w) for name in reached)]
        return report, missing

    def _wanted(self) -> Iterator[str]:
        """How the names of the gates begin that there should be, and the races without one."""
        for name in self.setup["shapes"]:
            for routing in ROUTINGS:
                if name in PREFILL_GATED:
                    yield f"{name} prefill, {routing}: speed over transformers"
                    yield f"{name} prefill, {routing}: time over the unfused floor"
                else:
                    yield f"{name} prefill, {routing}: race"
                yield f"{name} decode, {routing}: time over the weight-streaming floor"
                yield f"{name} decode, {routing}: time over tf"
            if name in PREFILL_GATED:
                for stage in ("plan", "permute", "combine"):
                    yield f"{name} {stage} at 32k slots"

    def _race_gates(self, report: Report, race: dict[str, Any]) -> None:
        name, phase, times = race["shape"]["name"], race["phase"], race["times"]
        floor = self.floors_us(race)
        ours = times.get(OURS)
        if ours is None or not ours["graph"] or name not in self.setup["shapes"]:
            return
        label = race["case"]
        if label.endswith("compiled"):
            floor = {}  # once is enough
        elif phase == "prefill" and name in PREFILL_GATED:
            if GROUPED in times:
                faster = over(times, GROUPED)
                report.gate(f"{label}: speed over transformers grouped_mm", faster, at_least=1.2)
            if floor:
                ratio = ours["median_us"] / floor["unfused"]
                report.gate(f"{label}: time over the unfused floor", ratio, at_most=1.6)
                report.gates[-1]["goal"] = 1.35
        if phase == "decode":
            if floor:
                ratio = ours["median_us"] / floor["fused"]
                report.gate(f"{label}: time over the weight-streaming floor", ratio, at_most=1.25)
            rivals = {n: over(times, n) for n in RIVALS if n in times}
            if rivals:
                best = min(rivals, key=lambda n: rivals[n])
                # Two equal things come apart by as much as the noise, so that is no slower.
                bound = 1 + (race["noise"] or 0)
                report.gate(f"{label}: time over {best}'s", 1 / rivals[best], at_most=bound)

    def _stage_gates(self, report: Report, of: dict[str, Any]) -> None:
        if of["rows"] != PLANNED_SLOTS:
            return
        stages = of["backends"].get("cuda+grouped_mm") or of["backends"].get("cuda+triton") or {}
        floor = self.floors_us(of)
        name = of["shape"]["name"]
        if "plan" in stages:
            us = stages["plan"]["in_graph"]
            report.gate(f"{name} plan at 32k slots, us in a graph", us, at_most=12)
        for stage in ("permute", "combine"):
            if stage in stages and floor:
                ratio = stages[stage]["in_graph"] / floor[stage]
                report.gate(f"{name} {stage} at 32k slots: over its floor", ratio, at_most=1.3)

    # -- what is printed --------------------------------------------------------------------------

    def show(self) -> int:
        """Print everything, gates last. Returns the exit status."""
        self._show_machine()
        self._show_races()
        self._show_stages()
        self._show_tiles()
        self._show_remarks()
        report, missing = self.gates()
        print()
        rows = [
            [g["name"], f"{g['value']:.4g}", g["bound"], "ok" if g["passed"] else "FAILED"]
            for g in report.gates
        ]
        table(["gate", "measured", "bound", ""], rows)
        for what in missing:
            print(f"not reached: {what}")
        if not self.gated:
            print("No speed gates: they are for a GPU and the published shapes.")
        return 0 if not missing and all(g["passed"] for g in report.gates) else 1

    def _show_machine(self) -> None:
        versions = ", ".join(f"{k} {v}" for k, v in self.build.get("versions", {}).items() if v)
        print(f"{self.build.get('device_name', 'unknown device')}; {versions}")
        if "compile_s" in self.build:
            print(
                f"kernels for {self.build['arch']} by NVRTC {self.build['nvrtc']} in "
                f"{self.build['compile_s']:.2f} s, {self.build['cubin_bytes']:,} bytes; loaded in "
                f"{self.build.get('load_s', 0):.2f} s"
            )
        if "kernels_missing" in self.build:
            print(f"NO KERNELS: {self.build['kernels_missing'][:1500]}")
        if self.ceilings:
            rates = self.ceilings["matmul_flop_per_s"]
            print(
                f"copy {self.ceilings['copy_bytes_per_s'] / 1e12:.3f} TB/s, matmul bf16 "
                f"{rates['bfloat16'] / 1e12:.4g} TFLOP/s (random data); driver "
                f"{self.ceilings['driver'] or '-'}, clocks {self.ceilings['clocks_mhz']}"
            )
        checks = self.numbers["check"] + self.numbers["checked"]
        print(f"checks: {sum(c['ok'] for c in checks)} of {len(checks)} passed")

    def _show_races(self) -> None:
        print("\nMicroseconds, median ± half the quartiles' distance; * with launches, no graph")
        head = [
            "case",
            "ours by",
            *COLUMNS.values(),
            "noise",
            "tf gmm/ours",
            "unfused",
            "/floor",
            "fused",
        ]
        rows = []
        failed = {(c["case"], c["name"]) for c in self.numbers["checked"] if not c["ok"]}
        for race in self.numbers["race"]:
            times, floor = race["times"], self.floors_us(race)
            row = [race["case"], race["backend"].partition(":")[0].removeprefix("cuda+") or "-"]
            row += [_cell(times.get(n), (race["case"], n) in failed) for n in COLUMNS]
            row.append("-" if race["noise"] is None else f"{100 * race['noise']:.1f}%")
            both = OURS in times and GROUPED in times
            row.append(f"{over(times, GROUPED):.2f}" if both else "-")
            least = floor.get("unfused" if race["phase"] == "prefill" else "fused")
            at_floor = OURS in times and least
            row.append(f"{floor['unfused']:.0f}" if floor else "-")
            row.append(f"{times[OURS]['median_us'] / least:.2f}" if at_floor else "-")
            row.append(f"{floor['fused']:.0f}" if floor else "-")
            rows.append(row)
        table(head, rows)

    def _show_stages(self) -> None:
        rows = []
        for of in self.numbers["stages"]:
            floor = self.floors_us(of)
            for backend, stages in of["backends"].items():
                row = [f"{of['shape']['name']} {of['phase']}, {backend}"]
                for name in floors.STAGES:
                    us = stages.get(name, {}).get("in_graph")
                    ratio = f" ({us / floor[name]:.2f})" if us is not None and floor else ""
                    row.append("-" if us is None else f"{us:.1f}{ratio}")
                rows.append(row)
        if rows:
            print("\nStages inside a graph with a cold cache, microseconds (over the floor)")
            print("(gate_up and down of the Triton kernel gather and gate too: no such floor)")
            table(["stages", *floors.STAGES], rows)

    def _show_tiles(self) -> None:
        rows = [
            [each["case"], *(f"{us['median_us']:.0f}" for us in each["times"].values())]
            for each in self.numbers["tiles"]
        ]
        if rows:
            print()
            table(["Triton layer by rows of a tile, us", *self.numbers["tiles"][0]["times"]], rows)

    def _show_remarks(self) -> None:
        lines: dict[str, list[str]] = {}
        for kind in ("absent", "waits", "checked", "check"):
            for e in self.numbers[kind]:
                if e.get("ok"):
                    continue
                who = e.get("name") if kind in ("absent", "waits") else f"CHECK {e.get('name')}"
                if kind == "check":
                    who = f"CHECK {e['what']}"
                why = e.get("why") if kind in ("absent", "waits") else e.get("said")
                lines.setdefault(f"{who}: {why}", []).append(e.get("case", "small layers"))
        for e in self.numbers["note"]:
            lines.setdefault(e["what"], [])
        done = set(self.done())
        for e in self.numbers["not_reached"]:
            if e["what"] in done:
                continue  # reached at a second try
            lines.setdefault(f"not reached: {e['what']} ({e['why']})", [])
        if lines:
            print()
        for text, cases in lines.items():
            more = f", and {len(cases) - 1} more" if len(cases) > 1 else ""
            where = f" [{cases[0]}{more}]" if cases else ""
            print(f"- {text[:400]}{where}")

    # -- what is written --------------------------------------------------------------------------

    def write(self, folders: list[Path]) -> list[Path]:
        """Write what there is so far: `<device>-<date>.json` in each folder."""
        report, missing = self.gates()
        device = self.build.get("device_name", "unknown")
        text = json.dumps(
            {
                "script": "benchmarks/gpu/race.py",
                "date": self.begun.isoformat(timespec="seconds"),
                "machine": machine() | {k: v for k, v in self.build.items() if k != "versions"},
                "versions": self.build.get("versions", {}),
                "setup": self.setup,
                "gates": report.gates,
                "not_reached": missing,
                "numbers": {"ceilings": self.ceilings} | self._numbers(),
            },
            indent=1,
        )
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        written = []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{slug}-{self.begun:%Y-%m-%d}.json"
            part = path.with_suffix(".part")
            part.write_text(text + "\n", encoding="utf-8")
            os.replace(part, path)
            written.append(path)
        return written

    def _numbers(self) -> dict[str, list[dict[str, Any]]]:
        """With the floors of each case beside it."""
        return {
            kind: [e | {"floors_us": self.floors_us(e)} for e in events]
            if kind in ("race", "stages")
            else events
            for kind, events in self.numbers.items()
        }


def over(times: dict[str, dict[str, Any]], name: str) -> float:
    """How many times as long as ours it took: of pairs, where both were in graphs."""
    paired = times[name].get("over_ours")
    alone = times[name]["median_us"] / times[OURS]["median_us"]
    return float(alone if paired is None else paired)


def _cell(time: dict[str, Any] | None, failed: bool) -> str:
    if time is None:
        return "wrong" if failed else "-"
    half = 50 * (time["q75_us"] - time["q25_us"]) / time["median_us"]
    star = "" if time["graph"] else "*"
    return f"{time['median_us']:.0f}{star} ±{half:.1f}%"
