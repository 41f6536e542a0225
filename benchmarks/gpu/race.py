"""Our MoE layer against transformers' experts and the bare products, on one GPU, in one call.

Compiles the kernels, checks every backend (float64, integers, twice the same, NaN in unused rows),
measures the machine's ceilings, races under CUDA graphs on random data with a cold cache, and
measures the stages of our layer beside their floors. Needs torch, triton, transformers and
cuda.core, and no network; who cannot be had is listed with the reason.

    python benchmarks/gpu/race.py [--seconds 540] [--shapes olmoe,qwen3] [--trace RUN]
    python benchmarks/gpu/race.py --device cpu --tiny      (tries the script, without a GPU)

Results go to benchmarks/results/<gpu>-<date>.json, and to $OUT where that is set, after every case.
Each shape runs in a process of its own, most important first; one that breaks or hangs is started
again without whoever it broke at. Exit status: 1 if a check or a gate failed or was not reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from _common import RESULTS, progress
from result import Result

WORKER = Path(__file__).resolve().with_name("worker.py")
SHAPES = ("olmoe", "qwen3", "mixtral", "deepseek")
LIMITS_S = {"checks": 120, "race": 130, "recorded": 90, "compiled": 120, "tiles": 75}
"""No job may take longer, so that one that hangs leaves time for the others."""

GRACE_S = 15
"""A worker begins nothing this long before its limit."""

TRIES = 3


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        how: "done"; "broke"; or "late", with something left that there was no time for.
        at: What it was at when it broke or was stopped.
    """

    how: str
    at: str


@dataclass
class Race:
    """The whole race: jobs, in the order of their importance, and what came of them."""

    args: argparse.Namespace
    result: Result
    folder: Path
    keep_in: list[Path]

    def __post_init__(self) -> None:
        self.begun = time.time()
        self.until = self.begun + self.args.seconds
        self.hung: set[str] = set()
        out = os.environ.get("OUT")
        self.log = (Path(out) if out and self.keep_in else self.folder) / "race.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)

    def jobs(self) -> list[tuple[str, str, str]]:
        """(name, what, shape), most important first."""
        shapes = self.args.shapes
        found = [("checks", "checks", "")]
        found += [(shape, "race", shape) for shape in shapes]
        if self.args.trace:
            found.append(("recorded", "recorded", ""))
        if self.args.device == "cuda":
            found += [(f"{shape} compiled", "compiled", shape) for shape in shapes]
            found += [(f"{shape} tiles", "tiles", shape) for shape in shapes]
        return found

    def run(self) -> None:
        """All jobs, as far as there is time."""
        queue = deque((job, 1, set[str]()) for job in self.jobs())
        while queue:
            job, attempt, without = queue.popleft()
            name, what, _ = job
            why = ""
            if self.until - time.time() < 2 * GRACE_S:
                why = "no time left"
            elif what == "compiled" and "tf compiled" in self.hung:
                why = "compiling took too long before"
            if why:
                self.result.take({"kind": "not_reached", "what": name, "why": why})
                continue
            progress(f"{name} ({time.time() - self.begun:.0f} s)")
            outcome = self.job(*job, without | self.hung)
            self.save()
            again = (job, attempt + 1, without | {outcome.at})
            if outcome.how == "done" or attempt == TRIES or what in ("compiled", "tiles"):
                continue
            if outcome.how == "broke" and outcome.at:
                queue.appendleft(again)
            elif outcome.how == "late":  # the others first
                queue.append(again)

    def job(self, name: str, what: str, shape: str, without: set[str]) -> Outcome:
        """Run one job in a process."""
        limit = min(self.until - 5, time.time() + LIMITS_S[what])
        job = {
            "name": name,
            "what": what,
            "shape": shape,
            "without": sorted(without),
            "done": self.result.done(),
            "until": limit - GRACE_S,
            **{k: getattr(self.args, k) for k in ("device", "tiny", "quick", "seed", "trace")},
        }
        events = self.folder / f"{name.replace(' ', '-')}-{time.time_ns()}.jsonl"
        command = [sys.executable, str(WORKER), json.dumps(job), str(events)]
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"== {name}, without {sorted(without)}\n")
            log.flush()
            worker = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment(self.folder), process_group=0
            )
            try:
                return self._watch(worker, events, name, limit)
            finally:
                end(worker)

    def _watch(
        self, worker: subprocess.Popen[bytes], events: Path, name: str, limit: float
    ) -> Outcome:
        """Take in what a worker says until it ends, or its time does."""
        read, begun, how = 0, "", "broke"
        while True:
            ended = worker.poll() is not None
            lines = events.read_bytes()[read:] if events.exists() else b""
            lines = lines[: lines.rfind(b"\n") + 1]
            read += len(lines)
            for line in lines.splitlines():
                event = json.loads(line)
                kind = event["kind"]
                if kind in ("begin", "end"):
                    begun = event.get("what", "")
                    continue
                if kind == "done":
                    how = "done" if how == "broke" else how
                if kind == "not_reached" and event["why"] == "no time left":
                    how = "late"
                self.result.take(event)
                if "times" in event:
                    self.save()
            if ended:
                break
            if time.time() > limit:
                self.hung |= {begun} - {""}
                self._broke(name, begun, "stopped at its time limit")
                return Outcome("late", begun)
            time.sleep(0.1)
        if worker.returncode != 0 or how == "broke":
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self._broke(name, begun, f"ended with {worker.returncode}: {''.join(said[-1:])}")
            return Outcome("broke", begun)
        return Outcome(how, "")

    def _broke(self, name: str, begun: str, said: str) -> None:
        """Count it as a failed check, so that the exit status says so."""
        what = f"{name}, during {begun or 'its start'}"
        self.result.take({"kind": "check", "what": what, "ok": False, "said": said})

    def save(self) -> None:
        """Write what there is so far."""
        self.result.write(self.keep_in)


def environment(folder: Path) -> dict[str, str]:
    """Of a worker: no network, kernels compiled anew and then shared, our backends as asked for."""
    found = dict(os.environ)
    found.pop("MOE_LENS_RUNTIME", None)
    found |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "MOE_LENS_CACHE": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    return found


def end(worker: subprocess.Popen[bytes]) -> None:
    """The worker, and what it started (torch.compile's helpers), if any is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--trace", metavar="RUN", help="race on the routing of this trace too")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; not for gates")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, to try the script")
    parser.add_argument("--keep", action="store_true", help="write the result in any case")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.shapes = [name for name in args.shapes.split(",") if name]
    if unknown := set(args.shapes) - set(SHAPES):
        parser.error(f"no shape {', '.join(sorted(unknown))}: there are {', '.join(SHAPES)}")
    return args


def main() -> int:
    args = arguments()
    on_gpu = args.device == "cuda" and not args.tiny
    keep_in = [RESULTS] if args.keep or (on_gpu and not args.quick) else []
    if os.environ.get("OUT") and (args.keep or args.device == "cuda"):
        keep_in.append(Path(os.environ["OUT"]))
    setup = {
        "shapes": args.shapes,
        "seconds": args.seconds,
        "dtype": "bfloat16",
        "gate_weights": "bfloat16",
        "prefill_tokens": 4096,
        "decode_tokens": 64,
        "seed": args.seed,
        "quick": args.quick,
        "tiny": args.tiny,
        "trace": bool(args.trace),
        "device": args.device,
    }
    result = Result(setup, gated=on_gpu)
    with tempfile.TemporaryDirectory(prefix="moe_lens-race-") as folder:
        race = Race(args, result, Path(folder), keep_in)
        # So that the tables come out when somebody's time limit ends this.
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            race.run()
        except KeyboardInterrupt:
            result.take({"kind": "note", "what": "interrupted: what follows is what there was"})
        race.save()
        status = result.show()
        for path in result.write(keep_in):
            print(f"written: {path}")
    print(f"{time.time() - race.begun:.0f} s, exit status {status}")
    return status


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
