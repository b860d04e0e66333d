"""Real Kubernetes clusters for the end-to-end tests: see :mod:`e2e.cluster.provider` for what they offer."""
