"""The plugin ``kubectl resilientllm``. kubectl finds ``kubectl-resilientllm`` by its name on the PATH."""
