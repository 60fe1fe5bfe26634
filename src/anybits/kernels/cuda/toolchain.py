"""NVRTC, the cache of what it compiled, and the driver: the only file that knows cuda-bindings.

cuda-bindings is the layer on which cuda-core stands. It is used directly because a launch is then one call, and
because its names have been the same from CUDA 12 to 13.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from anybits.errors import AnybitsError
from anybits.kernels.cuda.plan import Device, Kernel, Launch

logger = logging.getLogger(__name__)

OLDEST = (8, 0)
"""Compute capability of Ampere: the first with asynchronous copies and these tensor-core products."""
INSTALL = "install it with: pip install 'anybits[cuda]'"


@dataclass(frozen=True)
class Compiled:
    """A cubin and what ptxas said of it: registers of a thread, bytes spilled to memory, seconds to compile."""

    cubin: bytes
    registers: int
    spills: int
    seconds: float


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _done(answer: tuple[Any, ...], what: str) -> None:
    """Raise AnybitsError when the status that a call begins its answer with is not 0."""
    if int(answer[0]):
        raise AnybitsError(f"{what} failed: {getattr(answer[0], 'name', answer[0])}")


def _checked(answer: tuple[Any, ...], what: str) -> Any:
    """Return what a call gave behind its status; raise AnybitsError when the status is not 0."""
    _done(answer, what)
    return answer[1] if len(answer) == 2 else answer[1:]


@cache
def compiler_version() -> tuple[int, int]:
    """Return NVRTC's version; raise AnybitsError in one sentence when there is none."""
    try:
        major, minor = _checked(_nvrtc().nvrtcVersion(), "asking NVRTC for its version")
    except ImportError as error:
        raise AnybitsError(f"the package cuda-bindings is missing ({error}): {INSTALL}") from error
    except (RuntimeError, OSError) as error:
        raise AnybitsError(f"the CUDA run-time compiler (NVRTC) was not found: {INSTALL}") from error
    return int(major), int(minor)


@cache
def architecture(capability: tuple[int, int]) -> int:
    """Return the number of sm_NN to compile for: the highest that NVRTC knows and the GPU runs.

    Machine code runs on its own and later minor revisions of a compute capability, not on another major one.
    """
    compiler_version()
    known = [int(n) for n in _checked(_nvrtc().nvrtcGetSupportedArchs(), "asking NVRTC for its architectures")]
    major, minor = capability
    usable = [n for n in known if n // 10 == major and n % 10 <= minor]
    if not usable:
        version = ".".join(map(str, compiler_version()))
        raise AnybitsError(f"NVRTC {version} does not know compute capability {major}.{minor}: install a newer one")
    return max(usable)


def unsupported(capability: tuple[int, int]) -> str | None:
    """Return why a GPU of `capability` cannot be served on this machine, or None when it can."""
    if capability < OLDEST:
        major, minor = capability
        return f"its GPU has compute capability {major}.{minor} and the kernels need {OLDEST[0]}.{OLDEST[1]} or newer"
    try:
        architecture(capability)
        driver_major = _checked(_driver().cuDriverGetVersion(), "asking the driver for its version") // 1000
    except AnybitsError as error:
        return str(error)
    except (ImportError, RuntimeError, OSError) as error:
        return f"the NVIDIA driver was not found ({error})"
    major = compiler_version()[0]
    if driver_major < major:
        return f"the driver is for CUDA {driver_major} and NVRTC for CUDA {major}: update the driver"
    return None


def compile_kernel(kernel: Kernel, arch: int) -> Compiled:
    """Compile one variant for sm_`arch`, with no cache: needs no GPU."""
    compiler_version()
    nvrtc, started = _nvrtc(), time.perf_counter()
    program = _checked(nvrtc.nvrtcCreateProgram(kernel.text().encode(), kernel.source.encode(), 0, [], []), "NVRTC")
    options = [f"--gpu-architecture=sm_{arch}".encode(), b"--std=c++17", b"--ptxas-options=-v"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)
    size = _checked(nvrtc.nvrtcGetProgramLogSize(program), "reading NVRTC's log")
    log = bytes(max(size, 2))  # written in place: Python shares bytes of length 1 with everybody
    nvrtc.nvrtcGetProgramLog(program, log)
    said = log.decode(errors="replace").rstrip("\0")
    if int(status[0]):
        raise AnybitsError(f"NVRTC could not compile {kernel.source} {dict(kernel.macros)} for sm_{arch}: {said}")
    size = _checked(nvrtc.nvrtcGetCUBINSize(program), "NVRTC")
    cubin = b" " * size
    _done(nvrtc.nvrtcGetCUBIN(program, cubin), "NVRTC")
    nvrtc.nvrtcDestroyProgram(program)
    spills = _number_before(said, " bytes spill stores") + _number_before(said, " bytes stack frame")
    return Compiled(cubin, _number_before(said, " registers"), spills, time.perf_counter() - started)


def _number_before(text: str, words: str) -> int:
    """Return the number that stands before `words`, -1 where they are missing."""
    at = text.find(words)
    return int(text[:at].split()[-1]) if at > 0 else -1


def cache_folder() -> Path:
    """Return where cubins are kept: ANYBITS_CACHE, or anybits in the user's cache folder."""
    base = os.environ.get("ANYBITS_CACHE")
    if base:
        return Path(base) / "cuda"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anybits" / "cuda"


def cubin(kernel: Kernel, arch: int) -> bytes:
    """Return a variant's machine code, from the cache or compiled and put there.

    The name is a hash of the whole source with its macros, the architecture and NVRTC's version, so that a file is
    right or absent; it is renamed into place, so that a reader never sees half of one.
    """
    key = hashlib.sha256(f"{compiler_version()} sm_{arch}\n{kernel.text()}".encode()).hexdigest()[:32]
    file = cache_folder() / f"{kernel.source.removesuffix('.cu')}-sm_{arch}-{key}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        pass
    _announce_once(arch)
    compiled = compile_kernel(kernel, arch)
    logger.debug("%s %s: %d registers, %.2f s", kernel.source, kernel.macros, compiled.registers, compiled.seconds)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        with os.fdopen(handle, "wb") as out:
            out.write(compiled.cubin)
        os.replace(name, file)
    except OSError as error:
        logger.info("compiled CUDA kernels are not kept: %s", error)
    return compiled.cubin


def compile_ahead(kernels: Iterable[Kernel], arch: int) -> None:
    """Put variants into the cache, on all cores at once; each is compiled when it is first used otherwise."""
    compiler_version()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda kernel: cubin(kernel, arch), kernels))


@cache
def _announce_once(arch: int) -> None:
    logger.info(
        "compiling CUDA kernels for sm_%d, about a second each the first time; kept in %s", arch, cache_folder()
    )


class Loaded:
    """A kernel in one device's context, ready to launch."""

    def __init__(self, kernel: Kernel, index: int, arch: int, shared_bytes: int) -> None:
        driver = _driver()
        ensure_context(index)
        code = cubin(kernel, arch)
        self._module = _checked(driver.cuModuleLoadData(code), f"loading {kernel.source}")
        function = _checked(driver.cuModuleGetFunction(self._module, kernel.entry.encode()), f"finding {kernel.entry}")
        if shared_bytes > 48 << 10:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _done(driver.cuFuncSetAttribute(function, attribute, shared_bytes), "asking for shared memory")
        self._function = function
        self._launch = driver.cuLaunchKernel

    def __call__(self, launch: Launch, arguments: bytes, stream: int) -> None:
        """Start the kernel on `stream`; the driver copies `arguments` before this returns."""
        values = ctypes.create_string_buffer(arguments, len(arguments))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(values))
        (status,) = self._launch(
            self._function, *launch.grid, 1, launch.threads, 1, 1, launch.shared_bytes, stream,
            ctypes.addressof(pointers), 0,
        )  # fmt: skip
        if int(status):
            raise AnybitsError(f"launching {launch.kernel.source} failed: {getattr(status, 'name', status)}")


def ensure_context(index: int) -> None:
    """Make device `index`'s primary context, which is torch's, current in this thread unless it is already."""
    context, driver = _primary_context(index), _driver()
    if int(_checked(driver.cuCtxGetCurrent(), "asking for the context")) != int(context):
        _done(driver.cuCtxSetCurrent(context), "entering the context")


@cache
def _primary_context(index: int) -> Any:
    driver = _driver()
    _done(driver.cuInit(0), "starting the CUDA driver")
    device = _checked(driver.cuDeviceGet(index), f"finding CUDA device {index}")
    return _checked(driver.cuDevicePrimaryCtxRetain(device), f"opening CUDA device {index}")


_loaded: dict[tuple[Kernel, int, int], Loaded] = {}


def loaded(launch: Launch, index: int, arch: int, capturing: bool) -> Loaded:
    """Return `launch`'s kernel on device `index`, compiled and loaded on first use."""
    key = (launch.kernel, index, launch.shared_bytes)
    found = _loaded.get(key)
    if found is None:
        if capturing:
            raise AnybitsError(
                "a kernel would have to be compiled and loaded while a CUDA graph is being captured: "
                "run the same precision and number of rows once before capturing"
            )
        found = _loaded.setdefault(key, Loaded(launch.kernel, index, arch, launch.shared_bytes))
    return found


__all__ = ["Compiled", "Device", "compile_ahead", "compile_kernel", "cubin", "loaded", "unsupported"]
