"""`moe-lens machine`: what this machine can do at most."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from moe_lens.errors import CommandError


def machine(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how fast this machine copies and multiplies, and keep it for `moe-lens replay`.

    The floors of a replay are computed from these two. On a CPU it is one thread that is measured.

    \b
    Examples:
      moe-lens machine
      moe-lens machine --device cpu --json
    """  # noqa: D301  (\b keeps the lines as they are)
    from moe_lens.replay.machine import ceilings_path, one_thread, store
    from moe_lens.replay.settings import Settings, device_of
    from moe_lens.runtime.ceilings import measure

    where = device_of(Settings(device=device))
    with one_thread(where):
        found = measure(where)
        path = ceilings_path(where)
        if as_json:
            typer.echo(json.dumps({"stored": str(path), **asdict(found)}, indent=1))
        else:
            threads = f", {found.threads} thread" if found.device == "cpu" else ""
            typer.echo(f"{found.device_name} ({found.device}{threads})")
            typer.echo(f"  copy      {found.copy_bytes_per_s / 1e9:,.1f} GB/s, read and written")
            for dtype, rate in found.matmul_flop_per_s.items():
                typer.echo(f"  {dtype:9} {rate / 1e9:,.1f} GFLOP/s")
            for clock, mhz in found.clocks_mhz.items():
                typer.echo(f"  clock {clock} {mhz:,.0f} MHz")
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
