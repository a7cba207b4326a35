"""The driver, the cubin cache and the choice of a kernel, with a driver that is none.

The fake driver keeps a stack of contexts for every thread, as CUDA does, and refuses
every call for which no context of the right device is current.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pwd
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_engine import HostEngine
from support import files_of_at_most

from ekfac.errors import EkfacWarning
from ekfac.kernels.cuda import compiler, dispatch, driver
from ekfac.kernels.cuda.compiler import BFLOAT16, FLOAT, TF32, Variant
from ekfac.kernels.cuda.diagonal import diagonal_variant
from ekfac.kernels.cuda.dispatch import KernelCache
from ekfac.kernels.cuda.driver import DeviceEngine, HandlePool
from ekfac.kernels.cuda.gram import gram_variant
from ekfac.kernels.cuda.jacobi import VARIANT as JACOBI
from ekfac.kernels.cuda.jacobi import JacobiParams
from ekfac.kernels.cuda.launch import Launch

INVALID_CONTEXT, INVALID_IMAGE, NO_MEMORY = 201, 200, 2
DIAGONAL = diagonal_variant(FLOAT, 16)


class FakeDriver:
    """What is asked of ``libcuda``, for devices that are not there.

    Attributes:
        launches: Context, function and thread of every launch.
        bad: Machine code that is not loaded.
        failing: Code that loading a module returns, if any.
    """

    def __init__(self) -> None:
        self.contexts = threading.local()
        self.launches: list[tuple[int, int, int]] = []
        self.streams: list[int | None] = []
        self.loaded: list[bytes] = []
        self.functions: dict[int, tuple[str, int]] = {}
        self.attributes: dict[int, int] = {}
        self.bad: set[bytes] = set()
        self.failing = 0

    def stack(self) -> list[int]:
        if not hasattr(self.contexts, "stack"):
            self.contexts.stack = []
        stack: list[int] = self.contexts.stack
        return stack

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDriverGetVersion(self, to: Any) -> int:
        to._obj.value = 12040
        return 0

    def cuGetErrorString(self, code: int, to: Any) -> int:
        to._obj.value = f"error {code}".encode()
        return 0

    def cuDeviceGet(self, to: Any, index: int) -> int:
        to._obj.value = index
        return 0

    def cuDevicePrimaryCtxRetain(self, to: Any, device: ctypes.c_int) -> int:
        to._obj.value = 100 + device.value
        return 0

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:
        assert context.value is not None
        self.stack().append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, to: Any) -> int:
        to._obj.value = self.stack().pop()
        return 0

    def cuModuleLoadData(self, to: Any, code: bytes) -> int:
        if not self.stack():
            return INVALID_CONTEXT
        if self.failing:
            return self.failing
        if code in self.bad:
            return INVALID_IMAGE
        self.loaded.append(code)
        to._obj.value = 1000 * self.stack()[-1] + len(self.loaded)
        return 0

    def cuModuleGetFunction(self, to: Any, module: Any, name: bytes) -> int:
        if not self.stack() or module.value // 1000 != self.stack()[-1]:
            return INVALID_CONTEXT
        handle = 1000 * module.value + len(self.functions)
        self.functions[handle] = (name.decode(), self.stack()[-1])
        to._obj.value = handle
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        if self.functions[function.value][1] not in self.stack()[-1:]:
            return INVALID_CONTEXT
        self.attributes[function.value] = value
        return 0

    def cuLaunchKernel(self, function: Any, *rest: object) -> int:
        if self.functions[function.value][1] not in self.stack()[-1:]:
            return INVALID_CONTEXT
        thread = threading.get_ident()
        self.launches.append((self.stack()[-1], function.value, thread))
        stream = rest[7]  # after the grid, the block, and the shared memory
        assert isinstance(stream, ctypes.c_void_p)
        self.streams.append(stream.value)
        return 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an empty cache."""
    monkeypatch.setenv("EKFAC_CACHE", str(tmp_path))
    return tmp_path / "cubins"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """Return what was compiled, by a compiler that is none."""
    found: list[Variant] = []

    def compile_variant(variant: Variant, architecture: str) -> tuple[bytes, str]:
        found.append(variant)
        return f"{variant} for {architecture}, {len(found)}".encode(), ""

    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "compile_variant", compile_variant)
    return found


@pytest.fixture
def fake(
    monkeypatch: pytest.MonkeyPatch, cache: Path, compiled: list[Variant]
) -> FakeDriver:
    """Return a driver with devices that torch believes in."""
    found = FakeDriver()
    properties = SimpleNamespace(
        name="a device",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=1 << 17,
    )
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(driver, "_driver", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return found


def engine(index: int) -> DeviceEngine:
    return DeviceEngine(torch.device("cuda", index))


def launch(one: DeviceEngine, variant: Variant, kernel: str) -> None:
    one.launch(Launch(variant, kernel, JacobiParams(), 1, 32))


# -- the driver ------------------------------------------------------------------------


def test_warpgroups_are_of_capability_nine_and_no_other(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        names = ("major", "minor"), capability
        properties = SimpleNamespace(
            name="a device", multi_processor_count=1, **dict(zip(*names, strict=True))
        )
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, p=properties: p
        )
        found[capability] = engine(0).warpgroups
    assert [key for key, value in found.items() if value] == [(9, 0)]
    variant = gram_variant(BFLOAT16, 192, False, 16, pipeline=True, warpgroups=True)
    assert compiler.options(variant, "sm_90")[0] == "--gpu-architecture=sm_90a"
    assert compiler.options(DIAGONAL, "sm_90")[0] == "--gpu-architecture=sm_90"


def test_threads_without_a_context_launch(fake: FakeDriver) -> None:
    """Also the first act of a thread, whoever loaded the kernel."""
    one = engine(0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(one.load, DIAGONAL).result()
    launch(one, DIAGONAL, "diagonal")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(launch, one, DIAGONAL, "diagonal_finish").result()
    assert [context for context, _, _ in fake.launches] == [100, 100]
    assert len({thread for *_, thread in fake.launches}) == 2
    assert not fake.stack()


def test_devices_have_contexts_and_functions_of_their_own(fake: FakeDriver) -> None:
    engines = [engine(0), engine(1)]
    for one in engines:
        one.load(DIAGONAL)
    fake.stack().append(100)  # the thread is at the first device
    for one in reversed(engines):
        launch(one, DIAGONAL, "diagonal")
    assert [context for context, _, _ in fake.launches] == [101, 100]
    assert fake.stack() == [100]  # and stays there


def test_launches_go_to_the_stream_that_is_current(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the launch's own device, each time anew."""
    engines = [engine(0), engine(1)]
    current = {0: 7, 1: 8}

    def stream(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=current[device.index])

    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    for one in engines:
        one.load(DIAGONAL)
        launch(one, DIAGONAL, "diagonal")
    current[0] = 9  # as within torch.cuda.stream(...)
    launch(engines[0], DIAGONAL, "diagonal")
    assert fake.streams == [7, 8, 9]


def test_functions_are_looked_up_when_loaded(fake: FakeDriver) -> None:
    """During the capture of a graph nothing but launches is left to do."""
    one = engine(0)
    for kernel in dispatch.KERNELS.values():
        one.load(kernel.variants(16)[0])
    names = {name for name, _ in fake.functions.values()}
    assert set(dispatch.KERNELS) <= names
    assert {f"{n}_finish" for n in dispatch.KERNELS if n != "jacobi"} <= names
    large = {fake.functions[handle][0] for handle in fake.attributes}
    assert large == {"jacobi", "spectral", "spectral_finish"}
    # Static shared memory and as much dynamic as a device allows would be too much.
    one.load(gram_variant(TF32, 128, False, 16, pipeline=True))
    large = {fake.functions[handle][0] for handle in fake.attributes}
    assert large >= {"jacobi", "spectral", "gram", "gram_finish"}
    assert set(fake.attributes.values()) == {1 << 17}


def test_a_failed_launch_leaves_the_context_alone(fake: FakeDriver) -> None:
    one = engine(0)
    one.load(DIAGONAL)
    fake.cuLaunchKernel = lambda *_: NO_MEMORY  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError, match="code 2"):
        launch(one, DIAGONAL, "diagonal")
    fake.cuLaunchKernel = lambda *_: 719  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="code 719: error 719"):
        launch(one, DIAGONAL, "diagonal")
    assert not fake.stack()


def test_threads_load_a_variant_once(fake: FakeDriver, compiled: list[Variant]) -> None:
    one = engine(0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one.load, [DIAGONAL, JACOBI] * 8))
    assert sorted(compiled) == sorted([DIAGONAL, JACOBI])
    assert len(fake.loaded) == 2


def test_code_that_the_driver_refuses_is_compiled_again(
    fake: FakeDriver, compiled: list[Variant]
) -> None:
    """It may be whole and yet not for this driver."""
    engine(0).load(DIAGONAL)
    fake.bad.add(fake.loaded[0])
    other = engine(0)
    other.load(DIAGONAL)
    assert len(compiled) == 2
    assert other.compiled[DIAGONAL]
    again = engine(0)
    again.load(DIAGONAL)  # what was compiled last is in the cache
    assert len(compiled) == 2
    fake.bad.update(fake.loaded)
    fake.cuModuleLoadData = lambda *_: INVALID_IMAGE  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="code 200"):
        engine(0).load(DIAGONAL)
    assert len(compiled) == 3  # no more than once each time


# -- the cache -------------------------------------------------------------------------


def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("EKFAC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "ekfac" / "cubins"
    monkeypatch.setenv("EKFAC_CACHE", str(tmp_path / "own"))
    assert compiler.cache_folder() == tmp_path / "own" / "cubins"


def test_files_are_the_users_own(cache: Path) -> None:
    before = os.umask(0)
    try:
        compiler.write_cached("name", b"content")
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert (cache / "name").stat().st_mode & 0o077 == 0
    assert compiler.read_cached("name") == b"content"
    assert compiler.read_cached("other") is None
    assert [path.name for path in cache.iterdir()] == ["name"]


def flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda raw: raw[:-1],
        lambda raw: raw[: compiler.DIGEST],
        lambda raw: b"",
        lambda raw: raw + b"x",
        lambda raw: raw[compiler.DIGEST :],
        lambda raw: bytes(len(raw)),
    ],
)
def test_damaged_entries_are_compiled_again(
    cache: Path, compiled: list[Variant], damage: Callable[[bytes], bytes]
) -> None:
    good, new = compiler.cached_code(JACOBI, "sm_90")
    assert new
    assert compiler.cached_code(JACOBI, "sm_90") == (good, False)
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    code, new = compiler.cached_code(JACOBI, "sm_90")
    assert new
    assert code != good  # the fake compiler counts
    assert compiler.cached_code(JACOBI, "sm_90") == (code, False)
    assert len(compiled) == 2


def test_an_entry_under_another_name_is_not_taken(
    cache: Path, compiled: list[Variant]
) -> None:
    """The digest binds content and name."""
    compiler.cached_code(JACOBI, "sm_80")
    (path,) = cache.iterdir()
    path.rename(cache / compiler.cache_name(JACOBI, "sm_90"))
    code, new = compiler.cached_code(JACOBI, "sm_90")
    assert new
    assert b"sm_90" in code


def test_folders_that_others_can_write_are_not_used(
    cache: Path, compiled: list[Variant]
) -> None:
    compiler.cached_code(JACOBI, "sm_90")
    cache.chmod(0o770)
    with pytest.warns(EkfacWarning, match=r"mode 770.*EKFAC_CACHE"):
        _, new = compiler.cached_code(JACOBI, "sm_90")
    assert new
    cache.chmod(0o700)
    assert not compiler.cached_code(JACOBI, "sm_90")[1]


def test_a_link_is_not_followed(cache: Path, compiled: list[Variant]) -> None:
    elsewhere = cache.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    cache.symlink_to(elsewhere)
    with pytest.warns(EkfacWarning, match="not a folder"):
        compiler.cached_code(JACOBI, "sm_90")
    assert not list(elsewhere.iterdir())


def test_folders_of_other_users_are_not_used(
    cache: Path, compiled: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.cached_code(JACOBI, "sm_90")
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.warns(EkfacWarning, match=f"user with number {own}"):
        assert compiler.cached_code(JACOBI, "sm_90")[1]


def test_a_cache_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: list[Variant]
) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EKFAC_CACHE", str(tmp_path / "file"))
    for count in (1, 2):
        _, new = compiler.cached_code(JACOBI, "sm_90")
        assert new
        assert len(compiled) == count


def test_a_full_disc_leaves_nothing_behind(
    cache: Path, compiled: list[Variant]
) -> None:
    """The system takes a part of the file and no more."""
    with files_of_at_most(compiler.DIGEST + 3):
        code, new = compiler.cached_code(JACOBI, "sm_90")
    assert new
    assert code
    assert not list(cache.iterdir())
    assert compiler.cached_code(JACOBI, "sm_90")[1]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of a POSIX system")
def test_a_folder_that_others_can_exchange_is_not_used(
    cache: Path, compiled: list[Variant]
) -> None:
    compiler.cached_code(JACOBI, "sm_90")
    shared = cache.parent
    shared.chmod(0o777)
    with pytest.warns(EkfacWarning, match=f"others may exchange it.*{shared}"):
        assert compiler.cached_code(JACOBI, "sm_90")[1]
    shared.chmod(0o1777)  # as /tmp: only the owner exchanges files
    assert not compiler.cached_code(JACOBI, "sm_90")[1]


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EKFAC_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", dict[int, Any]().__getitem__)
    folder = compiler.cache_folder()
    assert folder.parent.parent == Path(tempfile.gettempdir())


def test_links_and_pipes_in_the_place_of_an_entry(
    cache: Path, compiled: list[Variant], tmp_path: Path
) -> None:
    """They are replaced, not written through; a pipe does not hang."""
    compiler.cached_code(JACOBI, "sm_90")
    (path,) = cache.iterdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    for put in (lambda: path.symlink_to(victim), lambda: os.mkfifo(path)):
        path.unlink()
        put()
        assert compiler.cached_code(JACOBI, "sm_90")[1]
        assert victim.read_bytes() == b"mine"
        assert not path.is_symlink()
        assert not compiler.cached_code(JACOBI, "sm_90")[1]


def test_processes_that_start_together_see_whole_files(cache: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(4)]

    def work(i: int) -> None:
        for _ in range(20):
            compiler.write_cached("name", contents[i % 4])
            assert compiler.read_cached("name") in contents

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert [path.name for path in cache.iterdir()] == ["name"]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(i,)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [path.name for path in cache.iterdir()] == ["name"]


# -- memory and threads ----------------------------------------------------------------


class Short(HostEngine):
    """Has no memory for a while."""

    short = True
    error: type[Exception] = torch.OutOfMemoryError

    def load(self, variant: Variant) -> None:
        if self.short:
            raise self.error("out of memory")
        super().load(variant)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_being_out_of_memory_says_nothing_of_a_kernel(error: type[Exception]) -> None:
    own = Short()
    own.error = error
    kernels = KernelCache(own)
    variant = diagonal_variant(FLOAT, own.problems)
    assert not kernels.ready([variant])
    assert not kernels.broken
    own.short = False
    assert kernels.ready([variant])
    assert kernels.verified == {variant}


def test_plans_without_memory_are_left_to_the_reference() -> None:
    kernels = KernelCache(HostEngine())

    def plan() -> list[Launch]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert not kernels.run_planned(plan)
    assert not kernels.used
    assert not kernels.broken


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_caches", {})
    return iter(())


@pytest.mark.usefixtures("no_caches")
def test_a_device_without_memory_is_asked_again(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "cuDevicePrimaryCtxRetain", lambda *_: NO_MEMORY)
    assert dispatch._cache_of(0) is None
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "_caches", {})
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    properties = SimpleNamespace(
        name="a device", major=9, minor=0, multi_processor_count=1
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    with ThreadPoolExecutor(8) as pool:
        found = set(map(id, pool.map(dispatch._cache_of, [0] * 16)))
    assert len(found) == 1
    assert dispatch._cache_of(0) is not None


def test_threads_try_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = KernelCache(HostEngine())
    tried = []
    error_of = dispatch.error_of

    def counted(*arguments: Any) -> float:
        tried.append(threading.get_ident())
        return error_of(*arguments)

    monkeypatch.setattr(dispatch, "error_of", counted)
    variant = diagonal_variant(FLOAT, kernels.engine.problems)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(kernels.ready, [[variant]] * 16))
    assert len(tried) == 1


def test_no_two_threads_share_a_solvers_handle() -> None:
    made: list[object] = []
    busy: set[int] = set()
    barrier = threading.Barrier(4)

    def make(key: str) -> object:
        made.append(object())
        return made[-1]

    pool: HandlePool[str, object] = HandlePool(make)

    def work(_: int) -> None:
        for _ in range(25):
            with pool.lease("cuda:0") as one:
                assert id(one) not in busy
                busy.add(id(one))
                barrier.wait()
                busy.discard(id(one))
            barrier.wait()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert len(made) == 4
    with pytest.raises(RuntimeError, match="failed"), pool.lease("cuda:0") as one:
        raise RuntimeError("cuSOLVER failed")
    with pool.lease("cuda:1") as other:
        assert other is not one
    assert len(made) == 5  # one for the other device, none for the one that was free
