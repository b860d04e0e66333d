"""How the content of sealed blocks gets from one stage's KV cache to another's. Knows neither vLLM nor torch."""
