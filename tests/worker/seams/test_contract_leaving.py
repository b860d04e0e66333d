"""What `engine/leaving.py` relies on: how vLLM's API server takes signals, and where middleware stands."""

from __future__ import annotations

import ast

from vllm.config import VllmConfig
from vllm.entrypoints.launchers.cli_args import FrontendArgs

from tests.worker.seams.vllm_source import tree

LAUNCHER = "entrypoints/launchers/launcher.py"
REGISTER = "entrypoints/serve/middleware/register.py"


def function(path: str, name: str) -> str:
    found = [
        node
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]
    assert found, f"vLLM's {path} has no function {name} any more"
    return ast.unparse(found[0])


def test_the_flag_that_is_taken_over_is_there() -> None:
    assert "shutdown_timeout" in VllmConfig.__dataclass_fields__, "vLLM has no --shutdown-timeout any more"


def test_sigint_means_the_same_to_vllm_as_sigterm() -> None:
    source = function(LAUNCHER, "serve_http")
    for name in ("SIGINT", "SIGTERM"):
        assert f"loop.add_signal_handler(signal.{name}, signal_handler)" in source, f"vLLM takes {name} otherwise now"


def test_signals_are_taken_before_the_lifespan_starts() -> None:
    """The server's task, in which the lifespan starts, first runs when it is awaited."""
    source = function(LAUNCHER, "serve_http")
    made = source.index("loop.create_task(server.serve(")
    taken = source.index("loop.add_signal_handler(signal.SIGTERM")
    assert made < taken < source.index("await server_task")
    assert "await" not in source[made:taken], "vLLM awaits something before it takes signals"


def test_middleware_of_the_command_line_is_the_outermost() -> None:
    assert "middleware" in FrontendArgs.__dataclass_fields__, "vLLM has no --middleware any more"
    source = function(REGISTER, "init_entrypoints_middleware")
    last = source[source.index("for middleware in args.middleware") :]
    assert "app.add_middleware(imported)" in last
    assert (
        source.count("app.add_middleware") == source[: source.index("for middleware")].count("app.add_middleware") + 1
    )
