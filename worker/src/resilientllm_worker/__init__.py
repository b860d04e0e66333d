"""The vLLM data plane: stages that hold weights and KV, engines that schedule."""
