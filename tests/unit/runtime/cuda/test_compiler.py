"""The cache of compiled kernels: when it is used, and what happens when it cannot be."""

from __future__ import annotations

import builtins
import os
import tempfile
import warnings

import pytest
from support.cuda_tools import need_nvrtc

from moe_lens.errors import RuntimeUnavailable
from moe_lens.runtime.cuda import compiler

TEXT = 'extern "C" __global__ void nothing() {}'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    need_nvrtc()
    monkeypatch.setenv("MOE_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_warned", set())
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiled(monkeypatch):
    """How often NVRTC was asked, by processes that begin one after the other."""
    asked = []

    def counting(text: str, arch: str) -> bytes:
        asked.append(arch)
        return b"\x7fELF of " + arch.encode()

    monkeypatch.setattr(compiler, "_compile", counting)

    def in_a_new_process(text: str = TEXT, arch: str = "sm_80") -> int:
        monkeypatch.setattr(compiler, "_in_memory", {})
        before = len(asked)
        for _ in range(2):  # the second time from memory
            assert compiler.cubin(text, arch) == b"\x7fELF of " + arch.encode()
        return len(asked) - before

    return in_a_new_process


def test_compiles_once(cache, compiled):
    assert [compiled(), compiled()] == [1, 0]
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]  # nothing half written


def test_other_text_architecture_options_and_versions_are_other_code(cache, compiled, monkeypatch):
    assert compiled() == 1
    assert compiled(TEXT + " ") == 1
    assert compiled(arch="sm_90a") == 1
    core, (major, minor) = compiler.versions()
    for other in ((core, (major, minor + 1)), (core + ".post1", (major, minor))):
        with monkeypatch.context() as patch:
            patch.setattr(compiler, "versions", lambda other=other: other)
            assert compiled() == 1
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "OPTIONS", {"std": "c++20"})
        assert compiled() == 1
    assert compiled() == 0
    assert len(list(cache.iterdir())) == 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"moe_lens cubin \n"),
        lambda path: path.write_bytes(os.urandom(100)),
    ],
)
def test_damaged_code_is_compiled_anew_and_replaced(cache, compiled, damage):
    compiled()
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    damage(path)
    assert [compiled(), compiled()] == [1, 0]
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path, monkeypatch, cache, compiled):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MOE_LENS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot be kept in .*file.*set MOE_LENS_CACHE"):
        assert compiled() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled() == 1


@pytest.mark.parametrize("fails", ["open", "write", "rename"])
def test_a_folder_that_cannot_be_written(cache, compiled, monkeypatch, fails):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    cache.mkdir(parents=True)
    if fails == "open":
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    elif fails == "rename":
        monkeypatch.setattr(os, "replace", full)
        monkeypatch.setattr(compiler.Path, "replace", full)
    else:
        monkeypatch.setattr(compiler, "_header", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert compiled() == 1
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder(cache, compiled):
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    try:
        with pytest.warns(RuntimeWarning, match="Permission denied"):
            assert compiled() == 1
    finally:
        cache.chmod(0o700)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_LENS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / ".cache" / "moe_lens"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiler.cache_folder() == tmp_path / "xdg" / "moe_lens"
    monkeypatch.setenv("MOE_LENS_CACHE", str(tmp_path / "ours"))
    assert compiler.cache_folder() == tmp_path / "ours"


def test_the_real_compiler_fills_the_cache(cache, monkeypatch):
    monkeypatch.setattr(compiler, "_in_memory", {})
    code = compiler.cubin(TEXT, "sm_80")
    assert code[:4] == b"\x7fELF"
    (path,) = cache.iterdir()
    assert path.read_bytes().endswith(code)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((10, 3), "sm_103a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_capability_to_architecture(capability, arch):
    assert compiler.arch_of(capability) == arch


def test_a_device_older_than_the_kernels_is_refused():
    with pytest.raises(RuntimeUnavailable, match=r"8\.0 or later, and this device has 7\.5"):
        compiler.arch_of((7, 5))


@pytest.mark.parametrize("module", ["cuda.core", "cuda.bindings"])
def test_without_cuda_core(monkeypatch, module):
    real = builtins.__import__

    def without(name, globals=None, locals=None, fromlist=(), level=0):
        if name == module or name.startswith(module + "."):
            raise ImportError(f"No module named {module!r}")
        return real(name, globals, locals, fromlist, level)

    compiler.versions.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeUnavailable, match=r'pip install "moe-lens\[kernels\]"'):
        compiler.versions()


def test_without_nvrtc(monkeypatch):
    need_nvrtc()
    from cuda.bindings import nvrtc

    def lost():
        raise RuntimeError("libnvrtc.so: not found")

    compiler.versions.cache_clear()
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lost)
    with pytest.raises(RuntimeUnavailable, match=r"NVRTC.*was not found: pip install.*libnvrtc"):
        compiler.versions()
