"""Ports in a pod, and paths of the engine's control server."""

STAGE_PORT = 7000
"""Commands of engines and links of stages."""
STAGE_HEALTH_PORT = 7001
"""``/healthz``, ``/readyz`` and ``/metrics`` of a stage, plain HTTP, no secrets."""
ENGINE_API_PORT = 8000
"""vLLM's OpenAI-compatible API."""
ENGINE_CONTROL_PORT = 8001
"""``PUT /v1/plan`` and ``GET /v1/state`` (with ``?watch=true`` lines, without end) with
``Authorization: Bearer <token>``; ``GET /healthz`` without."""

PLAN_PATH = "/v1/plan"
STATE_PATH = "/v1/state"
HEALTH_PATH = "/healthz"
READY_PATH = "/readyz"
METRICS_PATH = "/metrics"
