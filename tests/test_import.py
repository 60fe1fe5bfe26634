"""What `import anybits` brings, in new processes: nothing heavy, and transformers that knows our checkpoints."""

import subprocess
import sys

import pytest

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "anybits" in AUTO_QUANTIZER_MAPPING
import anybits.quantize.pipeline
assert callable(anybits.load) and callable(anybits.quantize)
with anybits.precision(3):
    pass
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_and_the_command_line_start_without_torch() -> None:
    code = (
        "import sys, anybits, anybits.cli; print(*(name for name in ('torch', 'transformers') if name in sys.modules))"
    )
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import anybits, transformers",
        "import transformers, anybits",
        "import anybits; anybits.load; import transformers",
        "import anybits, importlib.util; assert importlib.util.find_spec('transformers'); import transformers",
        "import anybits.linear, anybits; from transformers import AutoModelForCausalLM",
    ],
)
def test_transformers_knows_our_checkpoints_in_any_order(imports: str) -> None:
    done = run(imports + REGISTERED)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_refused() -> None:
    done = run("import anybits; anybits.nothing")
    assert done.returncode == 1
    assert "has no attribute 'nothing'" in done.stderr
