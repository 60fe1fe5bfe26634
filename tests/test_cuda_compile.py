"""Every CUDA source through NVRTC for every architecture, without a GPU: it compiles, and no register spills.

`make test-cuda-compile` compiles every variant and prints registers; the ordinary run takes one of each source.
"""

import importlib.util
import os
from pathlib import Path

import pytest

from anybits.kernels.cuda import toolchain
from cuda_variants import SHARED, every, smallest

if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
    pytest.skip("cuda-bindings is not installed: pip install 'anybits[cuda]'", allow_module_level=True)
try:
    toolchain.compiler_version()
except toolchain.AnybitsError as missing:
    pytest.skip(str(missing), allow_module_level=True)

ALL = os.environ.get("ANYBITS_ALL_VARIANTS", "0") not in ("", "0")


@pytest.mark.parametrize("arch", SHARED)
def test_compiles_without_spills(arch, capsys):
    report = []
    for kernel in every(arch) if ALL else smallest(arch):
        compiled = toolchain.compile_kernel(kernel, arch)
        macros = " ".join(f"{name}={value}" for name, value in kernel.macros)
        report.append(f"sm_{arch} {compiled.registers:3d} registers {compiled.spills} spilled {kernel.source} {macros}")
        assert compiled.cubin[:4] == b"\x7fELF"
        assert 0 < compiled.registers <= 255
        if kernel.source != "simple.cu":  # the slow reference may do as it likes
            assert compiled.spills == 0, report[-1]
    with capsys.disabled():
        print(  # noqa: T201
            "\n" + "\n".join(sorted(report)) if ALL else f"\nsm_{arch}: {len(report)} variants, no spills"
        )


def test_cubins_are_kept_and_found(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYBITS_CACHE", str(tmp_path))
    kernel = next(k for k in smallest(90) if k.source == "reduce.cu")
    first = toolchain.cubin(kernel, 90)
    files = list((tmp_path / "cuda").iterdir())
    assert [f.suffix for f in files] == [".cubin"]
    monkeypatch.setattr(toolchain, "compile_kernel", lambda *_: pytest.fail("compiled again"))
    assert toolchain.cubin(kernel, 90) == first
    with pytest.raises(pytest.fail.Exception):
        toolchain.cubin(kernel, 80)


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("ANYBITS_CACHE", str(file))
    kernel = next(k for k in smallest(80) if k.source == "reduce.cu")
    assert toolchain.cubin(kernel, 80)[:4] == b"\x7fELF"


def test_architecture_is_the_highest_that_runs():
    assert toolchain.architecture((9, 0)) == 90
    assert toolchain.architecture((8, 6)) == 86
    assert toolchain.architecture((12, 0)) == 120
    with pytest.raises(toolchain.AnybitsError, match=r"does not know compute capability 99\.0"):
        toolchain.architecture((99, 0))


def test_reasons_are_sentences():
    assert "compute capability 7.5" in toolchain.unsupported((7, 5))
    if not any(Path(f).exists() for f in ("/dev/nvidia0", "/dev/nvidiactl")):
        assert "driver was not found" in toolchain.unsupported((9, 0))
