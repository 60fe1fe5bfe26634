"""What the backend asks of the CUDA driver, through the real cuda-bindings and a driver that writes it down.

No GPU: cuda_emulation/driver.c is loaded as libcuda in a process of its own. So names, types and order of arguments are
those that the installed bindings take, and a launch's arguments arrive byte for byte.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
    pytest.skip("cuda-bindings is not installed: pip install 'anybits[cuda]'", allow_module_level=True)
if shutil.which("gcc") is None or sys.platform != "linux":
    pytest.skip("the driver in the real one's place needs gcc on Linux", allow_module_level=True)

PROGRAM = """
import ctypes, json, sys
from anybits.errors import AnybitsError
from anybits.kernels.cuda import plan, toolchain
from anybits.kernels.cuda.layout import Shape

shape = Shape(8192, 28672, 0, 224, 1, 1, 0, 0, 1, 0b11100)
large = plan.product(shape, 1, 1, 2, plan.Device(132, 227 << 10), plan.Tuning()).launch
small = plan.dequantization(shape, 1, 2)
for launch in (large, small):  # before: NVRTC asks a driver that is there for more than this one knows
    toolchain.cubin(launch.kernel, 90)

fake = ctypes.CDLL(sys.argv[1])
fake.driver_seen.restype = ctypes.c_char_p
said = [toolchain.unsupported((9, 0)), toolchain.unsupported((7, 5))]
pointers = tuple(range(0x7f0000000000, 0x7f0000000006))
for launch, stream in ((large, 0), (large, 0x7fff12345678), (small, 1)):
    toolchain.ensure_context(1)
    toolchain.loaded(launch, 1, 90, False)(launch, launch.arguments(shape, 1, 28672, pointers), stream)
try:
    toolchain.loaded(plan.dequantization(shape, 0, 2), 1, 90, True)
except AnybitsError as error:
    said.append(str(error))
fake.driver_breaks(700)
try:
    toolchain.loaded(small, 1, 90, True)(small, small.arguments(shape, 1, 0, pointers), 0)
except AnybitsError as error:
    said.append(str(error))
sizes = [[*launch.grid, launch.threads, launch.shared_bytes] for launch in (large, small)]
arguments = small.arguments(shape, 1, 28672, pointers).hex(), large.arguments(shape, 1, 28672, pointers).hex()
print(json.dumps([said, fake.driver_seen().decode().splitlines(), sizes, arguments]))
"""


def test_calls_reach_the_driver_as_it_wants_them(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(HERE / "cuda_emulation" / "driver.c")]
    subprocess.run([*command, "-o", str(library)], check=True)
    paths = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)],
        env=os.environ | {"PYTHONPATH": paths, "ANYBITS_CACHE": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (said, calls, (large, small), (dequantize, product)) = json.loads(done.stdout)
    assert said[0] is None
    assert "compute capability 7.5" in said[1]
    assert "before capturing" in said[2]
    assert said[3] == "launching dequantize.cu failed: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert calls[:2] == ["init 0", "retain 1"]
    assert calls[2:6] == [
        "current 0x1001", "load 7fELF", "function 0x2000 multiply", f"attribute 0x3000 8 {large[3]}",
    ]  # fmt: skip
    assert large[3] > 48 << 10 > small[3]

    def launched(size: list[int], stream: str, arguments: str) -> str:
        grid_x, grid_y, threads, shared = size
        where = f"grid {grid_x} {grid_y} 1 block {threads} 1 1 shared {shared} stream {stream} extra 0"
        return f"launch 0x3000 {where} arguments {arguments}"

    assert calls[6:8] == [launched(large, "0", product), launched(large, "0x7fff12345678", product)]
    assert calls[8:11] == ["load 7fELF", "function 0x2000 dequantize", launched(small, "0x1", dequantize)]
    assert calls.count("init 0") == calls.count("retain 1") == calls.count("current 0x1001") == 1
