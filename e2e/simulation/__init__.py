"""Everything around the operator but the API server, without vLLM: engines, kubelets, and a way to end the operator."""
