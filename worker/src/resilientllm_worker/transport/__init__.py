"""Authenticated TCP connections that carry `protocol` messages and tensors. Knows neither vLLM nor torch."""
