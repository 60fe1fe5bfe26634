"""From a float model to bit-planes: the two published quantizers, calibration, and the block pipeline."""
