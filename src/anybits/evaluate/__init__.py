"""How good each precision is, measured on text: perplexity, divergence from the float model, reports."""
