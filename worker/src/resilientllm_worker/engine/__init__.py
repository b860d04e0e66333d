"""The engine of one instance: vLLM's API server and scheduler over stages that may come and go."""
