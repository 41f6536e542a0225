"""One job of the race, in a process of its own: what breaks here breaks nothing else.

A kernel that reads where it must not leaves a CUDA context that nothing runs in any more, so each
shape has its own process, and says what it begins before it begins: `race.py` starts it again
without whoever it died of.

    python benchmarks/gpu/worker.py JOB EVENTS     (both are race.py's business)
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import candidates as who
import checks
import measure
import shapes
import torch

from moe_lens.runtime import ceilings, timing
from moe_lens.runtime.cuda import compiler, launch
from moe_lens.runtime.gemm.tiles import BLOCK_ROWS
from moe_lens.runtime.layer import MoELayer
from moe_lens.runtime.weights import random_weights

AGAIN = "ours again"
"""The same work under another name: what two equal things come apart by."""


@dataclass
class Worker:
    """A job and where it reports to."""

    job: dict[str, Any]
    events: Path

    def __post_init__(self) -> None:
        self.device: str = self.job["device"]
        self.without = set(self.job["without"])
        self.tiny: bool = self.job["tiny"]

    def say(self, kind: str, **what: Any) -> None:
        """One line of the events' file."""
        line = json.dumps({"kind": kind, **what}, default=str)
        with self.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def late(self, what: str) -> bool:
        """Whether there is no time to begin this; said if so."""
        if time.time() < self.job["until"]:
            return False
        self.say("not_reached", what=what, why="no time left")
        return True

    # -- the checks and the machine ---------------------------------------------------------------

    def checks(self) -> None:
        """Compile, say what the machine is, check small layers, measure the ceilings."""
        self.say("build", **self.build())
        if "ceilings" not in self.without:
            self.say("begin", what="ceilings")
            if self.tiny:
                ceilings.REPEATS = 1
            self.say("ceilings", **asdict(ceilings.measure(self.device)), smi=smi(self.device))
            self.say("end")
        for name, check in checks.small(self.device, self.without):
            if name in self.without or name in self.job["done"] or self.late(name):
                continue
            self.say("begin", what=name)
            try:
                said = check()
                self.sound()
            except Exception as e:
                said = who.reason(e)
                self.sound()
            self.say("end")
            self.say("check", what=name, ok=not said, said=said)

    def build(self) -> dict[str, Any]:
        """Compile the kernels, and name everything that takes part."""
        about: dict[str, Any] = {"versions": versions(), "device_name": ceilings.device_name("cpu")}
        arch = "sm_90a"
        if self.device == "cuda":
            of = torch.cuda.get_device_properties(0)
            arch = compiler.arch_of((of.major, of.minor))
            about |= {
                "device_name": of.name,
                "capability": f"{of.major}.{of.minor}",
                "multiprocessors": of.multi_processor_count,
                "memory_gb": of.total_memory / 1e9,
                "l2_bytes": of.L2_cache_size,
            }
        try:
            begun = time.perf_counter()
            about["cubin_bytes"] = len(compiler.cubin(compiler.source(), arch))
            about["compile_s"] = time.perf_counter() - begun
            about["arch"], about["nvrtc"] = arch, ".".join(map(str, compiler.nvrtc_version()))
            if self.device == "cuda":
                begun = time.perf_counter()
                about["kernels"] = len(launch.load(0))
                about["load_s"] = time.perf_counter() - begun
        except Exception as e:  # the others race on without ours
            about["kernels_missing"] = f"{type(e).__name__}: {e}"
        return about

    # -- races ------------------------------------------------------------------------------------

    def race(self) -> None:
        """Every candidate on every case of a shape, and the stages of ours."""
        names = [n for n in who.NAMES if n != who.COMPILED]
        order = [(phase, r) for r in shapes.ROUTINGS for phase in shapes.TOKENS]
        self.cases(order, names, stages=True)

    def compiled(self) -> None:
        """torch.compile's best of the same layer, against ours and what it was made of."""
        names = ["ours auto", who.GROUPED, who.COMPILED]
        self.cases([(phase, "uniform") for phase in shapes.TOKENS], names, stages=False)

    def cases(self, order: list[tuple[str, str]], names: list[str], *, stages: bool) -> None:
        shape = shapes.shape_of(self.job["shape"], tiny=self.tiny)
        self.run_cases(shape, [(*each, None) for each in order], names, stages=stages)

    def recorded(self) -> None:
        """The routing of a trace, on the published layer that it fits."""
        tokens = shapes.TINY_TOKENS if self.tiny else shapes.TOKENS
        ids_TK, experts = shapes.recorded(self.job["trace"], tokens["prefill"])
        shape = shapes.recorded_shape(experts, ids_TK.shape[1], tiny=self.tiny)
        order = [(phase, "recorded", ids_TK[:n]) for phase, n in tokens.items()]
        names = [n for n in who.NAMES if n != who.COMPILED]
        self.run_cases(shape, order, names, stages=False)

    def run_cases(
        self,
        shape: shapes.Shape,
        order: list[tuple[str, str, Any]],
        names: list[str],
        *,
        stages: bool,
    ) -> None:
        weights = self.weights(shape)
        self.timing = measure.Timing(
            self.device, quick=self.job["quick"] or self.tiny, seed=self.job["seed"]
        )
        if self.timing.why_warm:
            self.say("note", what=f"caches are warm: {self.timing.why_warm}")
        for number, (phase, routing, ids_TK) in enumerate(order):
            key = f"{shape.name} {phase}, {routing}{self.suffix()}"
            if key in self.job["done"] or self.late(key):
                continue
            if ids_TK is None:
                tokens = (shapes.TINY_TOKENS if self.tiny else shapes.TOKENS)[phase]
                seed = self.job["seed"] + number
                ids_TK = shapes.routed(tokens, shape.experts, shape.top_k, routing, seed)
            case = shapes.case(shape, phase, routing, ids_TK, self.device, self.job["seed"])
            self.one(key, case, weights, names)
            key = f"{key}, stages"
            if stages and routing == "uniform" and key not in self.job["done"]:
                self.stages(key, case, weights)
            del case
            self.tidy()

    def one(self, key: str, case: shapes.Case, weights: who.Weights, names: list[str]) -> None:
        """Check everybody, then time who passed."""
        if f"timing of {key}" in self.without:
            self.say("not_reached", what=key, why="its timing broke or hung before")
            return
        works, launched, about = {}, {}, {}
        for each in who.candidates(case, weights, names):
            if each.name in self.without:
                self.say("absent", case=key, name=each.name, why="it broke or hung before")
                continue
            if each.work is None:
                self.say("absent", case=key, name=each.name, why=each.why)
                continue
            self.say("begin", what=each.name)
            checked = checks.candidate(each, case, weights)
            self.sound()
            if checked.said.startswith("OutOfMemoryError"):
                self.say("absent", case=key, name=each.name, why=checked.said)
            else:
                self.say("checked", case=key, name=each.name, why=each.why, **asdict(checked))
            if checked.ok:
                about[each.name] = each.why
                launched[each.name] = each.work
                if why_not := self.timing.waits(each.work):
                    self.say("waits", case=key, name=each.name, why=why_not)
                else:
                    works[each.name] = each.work
            self.say("end")
            self.tidy()
        if "ours auto" in works:
            works[AGAIN] = works["ours auto"]
        self.say("begin", what=f"timing of {key}")
        in_graphs, outside, failed = self.timing.race(
            works, launched if self.device == "cuda" else {}
        )
        self.sound()
        self.say("end")
        for name, why in failed.items():
            self.say("absent", case=key, name=name, why=why)
        ours = in_graphs.get("ours auto")
        noise = timing.noise_floor(ours, in_graphs[AGAIN]) if ours is not None else None
        times = {}
        for name in {**in_graphs, **outside}:
            seconds = in_graphs.get(name, outside.get(name, []))
            times[name] = measure.spread(seconds) | {"graph": name in in_graphs}
            if name in in_graphs and ours is not None:
                times[name]["over_ours"] = timing.ratio(ours, seconds)
            if name in outside:
                times[name]["launched_us"] = measure.spread(outside[name])["median_us"]
        self.say(
            "race",
            case=key,
            shape=asdict(case.shape),
            phase=case.phase,
            routing=case.routing,
            noise=noise,
            cold=self.timing.cold,
            times=times,
            backend=about.get("ours auto", ""),
            smi=smi(self.device),
            **case.counts(),
        )

    def stages(self, key: str, case: shapes.Case, weights: who.Weights) -> None:
        """The stages of ours, on each backend that splits into them."""
        if self.late(key):
            return
        found = {}
        backends = ("cpu",) if self.device == "cpu" else ("cuda+grouped_mm", "cuda+triton")
        for backend in backends:
            if key in self.without or backend in self.without:
                continue
            self.say("begin", what=key)
            try:
                layer = MoELayer(*weights, backend=backend)
                layer.expect(case.rows_E)
                parts = layer.parts(case.x_TD, case.ids_TK, case.weights_TK)
                found[backend] = self.timing.stages(parts)
            except Exception as e:
                self.say("absent", case=key, name=backend, why=who.reason(e))
            self.sound()
            self.say("end")
            self.tidy()
        self.say(
            "stages",
            case=key,
            shape=asdict(case.shape),
            phase=case.phase,
            routing=case.routing,
            backends=found,
            **case.counts(),
        )

    def tiles(self) -> None:
        """Which rows of a tile the Triton kernel is quickest with, for `gemm.tiles` to choose."""
        shape = shapes.shape_of(self.job["shape"], tiny=self.tiny)
        weights = self.weights(shape)
        clock = measure.Timing(self.device, quick=True, seed=self.job["seed"])
        for phase, tokens in (shapes.TINY_TOKENS if self.tiny else shapes.TOKENS).items():
            key = f"{shape.name} {phase}, uniform{self.suffix()}"
            if key in self.job["done"] or self.late(key):
                continue
            ids_TK = shapes.routed(tokens, shape.experts, shape.top_k, "uniform", self.job["seed"])
            case = shapes.case(shape, phase, "uniform", ids_TK, self.device, self.job["seed"])
            works = {}
            for rows in BLOCK_ROWS:
                layer = MoELayer(*weights, backend="cuda+triton")
                layer.expect([rows])
                works[str(rows)] = lambda of=layer, c=case: of(c.x_TD, c.ids_TK, c.weights_TK)
            self.say("begin", what=key)
            taken, _, _ = clock.race(works, {})
            self.sound()
            self.say("end")
            times = {name: measure.spread(seconds) for name, seconds in taken.items()}
            self.say("tiles", case=key, shape=asdict(shape), phase=phase, times=times)
            del works, case
            self.tidy()

    def suffix(self) -> str:
        """What sets the cases of this job apart from the same ones of another."""
        what = self.job["what"]
        return "" if what in ("race", "recorded") else f", {what}"

    # -- what they share --------------------------------------------------------------------------

    def weights(self, shape: shapes.Shape) -> who.Weights:
        return random_weights(
            shape.experts,
            shape.hidden,
            shape.intermediate,
            dtype=shapes.DTYPE,
            device=torch.device(self.device),
            seed=self.job["seed"],
        )

    def tidy(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def sound(self) -> None:
        """Leave if the device does not answer any more: no later figure would mean anything."""
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as e:
                self.say("note", what=f"{self.job['name']}: the device broke: {who.reason(e)}")
                os._exit(3)


def versions() -> dict[str, str]:
    """Of what takes part; "" for what is not there."""
    found = ceilings.versions()
    packages = ("numpy", "pyarrow", "transformers", "cuda-core", "cuda-bindings")
    for name in (*packages, "nvidia-cuda-nvrtc"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def smi(device: str) -> dict[str, str]:
    """Driver, clocks, temperature and power, as nvidia-smi tells them right now."""
    if device != "cuda":
        return {}
    fields = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    cells = [cell.strip() for cell in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(fields, cells, strict=False))


def main() -> int:
    """Do the job; anything that is not caught lower down ends it, and says so."""
    worker = Worker(json.loads(sys.argv[1]), Path(sys.argv[2]))
    gc.collect()
    gc.freeze()  # garbage is collected before every timing: do not look through all of torch
    if worker.device == "cpu":
        torch.set_num_threads(1)
    try:
        getattr(worker, worker.job["what"])()
    except Exception as e:
        worker.say("note", what=f"{worker.job['name']} ended early: {who.reason(e)}")
        raise
    worker.say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
