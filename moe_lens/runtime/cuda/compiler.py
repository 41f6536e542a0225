"""CUDA C++ text to a cubin, through NVRTC (cuda.core), once for each source, device and version.

A cubin and not PTX: NVRTC is often newer than the driver, which then takes its cubins, within one
major version, but not its PTX.

Compiled code is kept in `$MOE_LENS_CACHE`, or else `moe_lens/` in `$XDG_CACHE_HOME` or `~/.cache`.
Where that cannot be written, every process compiles anew and warns once.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
import warnings
from pathlib import Path

from moe_lens.errors import RuntimeUnavailable

CSRC = Path(__file__).parent / "csrc"
PARTS = ("prelude", "plan", "capacity", "permute", "swiglu", "combine", "flush_l2")
OPTIONS = {"std": "c++17"}
OLDEST = (8, 0)
"""The kernels round to bfloat16 with an instruction that came with Ampere."""

INSTALL = 'pip install "moe-lens[kernels]"'
_HEADER = b"moe_lens cubin "
_in_memory: dict[str, bytes] = {}
_warned: set[Path] = set()


@functools.cache
def source() -> str:
    """The text of all kernels."""
    # Messages of the compiler name the file and its own line.
    return "".join(
        f'#line 1 "{part}.cu"\n{(CSRC / part).with_suffix(".cu").read_text("utf-8")}'
        for part in PARTS
    )


@functools.cache
def kernel_names() -> tuple[str, ...]:
    """Every kernel in `source`: what begins with `moe_` there."""
    return tuple(sorted(set(re.findall(r"\bmoe_\w+", source()))))


def arch_of(capability: tuple[int, int]) -> str:
    """The NVRTC architecture of a device's compute capability: (9, 0) is "sm_90a".

    Raises:
        RuntimeUnavailable: The device is older than the kernels.
    """
    major, minor = capability
    if capability < OLDEST:
        raise RuntimeUnavailable(
            f"the CUDA kernels need compute capability {OLDEST[0]}.{OLDEST[1]} or later, and this "
            f'device has {major}.{minor}: force the backend "reference", or use another device'
        )
    # From Hopper on, "a" stands for everything that this very device can do.
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def cubin(text: str, arch: str) -> bytes:
    """Machine code of `text` for an architecture, compiled or from the cache.

    Raises:
        RuntimeUnavailable: cuda.core or NVRTC is missing, or NVRTC refused the text or the
            architecture; its log is in the message.
    """
    key = _key(text, arch)
    if key not in _in_memory:
        path = cache_folder() / "kernels" / f"{key}.cubin"
        code = _read(path)
        if code is None:
            code = _compile(text, arch)
            _write(path, code)
        _in_memory[key] = code
    return _in_memory[key]


def cache_folder() -> Path:
    """Where what is worked out once for this machine is kept. It need not exist."""
    if chosen := os.environ.get("MOE_LENS_CACHE"):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path("~/.cache").expanduser()) / "moe_lens"


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the NVRTC that cuda.core finds.

    Raises:
        RuntimeUnavailable: cuda.core or NVRTC is missing.
    """
    return versions()[1]


@functools.cache
def versions() -> tuple[str, tuple[int, int]]:
    """The version of cuda.core, and the major and minor version of the NVRTC that it finds.

    Raises:
        RuntimeUnavailable: One of the two is missing.
    """
    try:
        import cuda.core
        from cuda.bindings import nvrtc

        cuda.core.Program  # noqa: B018 - before 0.5 it was in cuda.core.experimental
    except (ImportError, AttributeError) as e:
        raise RuntimeUnavailable(
            f"the CUDA kernels need cuda.core 1.2 or later, which is not installed: {INSTALL} ({e})"
        ) from e
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as e:  # the bindings' own class, which differs between their versions
        raise RuntimeUnavailable(
            f"NVRTC, which compiles the CUDA kernels, was not found: {INSTALL} ({e})"
        ) from e
    if int(status) != 0:
        raise RuntimeUnavailable(f"NVRTC does not work here ({status}): {INSTALL}")
    return str(cuda.core.__version__), (major, minor)


def _key(text: str, arch: str) -> str:
    whole = repr((text, arch, sorted(OPTIONS.items()), versions()))
    return hashlib.sha256(whole.encode()).hexdigest()


def _compile(text: str, arch: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    try:
        options = ProgramOptions(name="moe_lens.cu", arch=arch, **OPTIONS)
        return bytes(Program(text, "c++", options).compile("cubin").code)
    except Exception as e:  # NVRTCError is not public; its text holds the log
        major, minor = versions()[1]
        hint = ""
        if "gpu-architecture" in str(e):
            hint = f" NVRTC {major}.{minor} does not know {arch}: a newer one may ({INSTALL} -U)."
        raise RuntimeUnavailable(
            f"NVRTC {major}.{minor} did not compile the kernels for {arch}.{hint} It says:\n{e}"
        ) from e


def _read(path: Path) -> bytes | None:
    """The code in a file of the cache, or None if it is missing, unreadable or damaged."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    header, _, code = kept.partition(b"\n")
    return code if code and header == _header(code) else None


def _write(path: Path, code: bytes) -> None:
    """Keep code for the next process; readers see a whole file or none."""
    written = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            written = Path(file.name)
            file.write(_header(code) + b"\n" + code)
        written.replace(path)
    except OSError as e:
        if written is not None:
            written.unlink(missing_ok=True)
        if path.parent not in _warned:
            _warned.add(path.parent)
            warnings.warn(
                f"compiled kernels cannot be kept in {path.parent} ({e.strerror or e}), so every "
                "process compiles them anew: set MOE_LENS_CACHE to a folder that can be written",
                RuntimeWarning,
                stacklevel=4,
            )


def _header(code: bytes) -> bytes:
    return _HEADER + hashlib.sha256(code).hexdigest().encode()
