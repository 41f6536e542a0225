"""`moe-lens machine`: what this machine can do at most."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.commands.machine_all_to_all import machine_all_to_all
from moe_lens.errors import CommandError

if TYPE_CHECKING:
    from moe_lens.runtime.ceilings import Ceilings


def machine(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")
    ] = None,
    all_to_all: Annotated[
        bool,
        typer.Option(
            "--all-to-all", help="Measure an all-to-all between processes instead, for --ep."
        ),
    ] = False,
    nproc: Annotated[
        int | None, typer.Option(help="Of --all-to-all: start so many processes.", min=2)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how fast this machine moves memory and multiplies, and keep it for `moe-lens replay`.

    The floors of a replay are computed from these rates. On a CPU it is one thread that is
    measured. A rate that was higher in an earlier measurement stays: remove the file to forget it.

    \b
    Examples:
      moe-lens machine
      moe-lens machine --device cpu --json
      moe-lens machine --all-to-all --nproc 8
    """  # noqa: D301  (\b keeps the lines as they are)
    if all_to_all:
        machine_all_to_all(device, nproc, as_json=as_json)
        return
    if nproc is not None:
        raise CommandError("--nproc belongs to --all-to-all.")

    from moe_lens.replay.machine import ceilings_path, highest, one_thread, store, stored
    from moe_lens.replay.settings import Settings, device_of
    from moe_lens.runtime.ceilings import measure

    where = device_of(Settings(device=device))
    with one_thread(where):
        path, before = ceilings_path(where), stored(where)
        now = measure(where)
        found = highest(now, before)
        if as_json:
            typer.echo(json.dumps({"stored": str(path), **asdict(found)}, indent=1))
        else:
            _print(found, now, before)
        try:
            store(found, where)
        except OSError as e:
            raise CommandError(
                f"{path} cannot be written ({e.strerror or e}), so these ceilings are not kept. "
                "MOE_LENS_CACHE names another folder.",
                exit_code=1,
            ) from e
    if not as_json:
        typer.echo(f"kept in {path}")


def _print(found: Ceilings, now: Ceilings, before: Ceilings | None) -> None:
    """What is kept, and beside it what was measured now, where that is less."""
    from moe_lens.replay.machine import ago

    def rate(name: str, kept: float, measured: float, unit: str) -> None:
        less = f" (now {measured / 1e9:,.1f})" if measured < kept else ""
        typer.echo(f"  {name:9} {kept / 1e9:,.1f} {unit}{less}")

    threads = f", {found.threads} thread" if found.device == "cpu" else ""
    typer.echo(f"{found.device_name} ({found.device}{threads})")
    rate("copy", found.copy_bytes_per_s, now.copy_bytes_per_s, "GB/s, read and written")
    rate("read", found.read_bytes_per_s, now.read_bytes_per_s, "GB/s")
    for dtype, kept in found.matmul_flop_per_s.items():
        rate(dtype, kept, now.matmul_flop_per_s[dtype], "GFLOP/s")
    for clock, mhz in found.clocks_mhz.items():
        typer.echo(f"  clock {clock} {mhz:,.0f} MHz")
    if before is not None:
        typer.echo(f"  the higher of now and what was stored {ago(before.measured_ns)}")
