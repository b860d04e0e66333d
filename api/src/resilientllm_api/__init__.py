"""The types that every part of ResilientLLM shares. Imports nothing of the other parts."""
