"""The faults that need a cluster, on the ground of the scenarios, with lines as `resilientllm chaos` writes them."""
