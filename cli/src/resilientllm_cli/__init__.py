"""The `resilientllm` command."""
