"""Keeps processes running, as a kubelet keeps containers. Knows nothing of stages and engines."""
