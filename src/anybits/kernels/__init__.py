"""y = x @ W_p.T straight from the planes: one file per backend, all held to `PlaneWeight.dequantize`."""
