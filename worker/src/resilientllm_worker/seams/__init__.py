"""The places where vLLM 0.32 is hooked: one file each, with a contract test that says what a new vLLM broke."""
