"""A stage that starts takes its weights from its twin, a living copy of it. Knows neither vLLM nor torch."""
