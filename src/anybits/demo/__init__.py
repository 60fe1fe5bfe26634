"""The bundled model and the tour of it that `make demo` gives."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""A small Llama trained by scripts/train_demo_model.py on the text of Python's standard library."""

HELD_OUT = MODEL / "held_out.txt"
"""Text of the same kind that the model was not trained on."""

CALIBRATION = MODEL / "calibration.txt"
"""Training text: for calibration, never for evaluation."""
