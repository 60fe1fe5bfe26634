"""An OpenAI-compatible server: requests at different precisions share one batch and one copy of the weights."""
