"""``resilientllm-engine``: ``vllm serve`` over stages.

Processes: this one is vLLM's API server, with the control server beside it in a thread. EngineCore, with our executor
and scheduler, is its child, as vLLM starts it.
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
from pathlib import Path

from resilientllm_api.engine_state import EnginePhase

from resilientllm_worker.engine import environment
from resilientllm_worker.process import add_common_flags, host_and_port, read_token, run_command
from resilientllm_worker.seams.launch import BadConfiguration, make_config, make_parser, prepare

PROGRAM = "resilientllm-engine"
logger = logging.getLogger(__name__)


def main() -> None:
    run_command(PROGRAM, _run)


def _run() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = make_parser(PROGRAM, "Serve one instance over its stages. Takes every flag of `vllm serve`.")
    group = add_common_flags(parser)
    group.add_argument(
        "--plan-file", type=Path, required=True, help="the plan; written here too, when the operator puts a newer one"
    )
    group.add_argument("--control", type=host_and_port, required=True, metavar="HOST:PORT", help="for plan and state")
    args = parser.parse_args()
    token = read_token(args.token_file)

    from resilientllm_worker.engine.control_server import ControlSocket, PlanStore, make_app, serve, watch_api

    store = PlanStore(args.instance, args.plan_file)
    try:
        serve(make_app(store, token), *args.control)
    except OSError as error:
        raise BadConfiguration(f"--control {args.control[0]}:{args.control[1]}: {error.strerror}") from error
    control = ControlSocket(store)
    environment.publish(args.instance, args.token_file, control.path)
    prepare(args)
    make_config(args)  # errors of the model or the layout end here, before a child process is made

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    from resilientllm_worker.engine.health import tell_the_truth
    from resilientllm_worker.engine.leaving import drain_before_the_end
    from resilientllm_worker.seams.request_errors import tell_that_retrying_helps

    tell_that_retrying_helps()
    watch_api(store, args.host, args.port)
    drain_before_the_end(args, store)
    tell_the_truth(args, store)
    try:
        uvloop.run(run_server(args))
    except (SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise BadConfiguration(f"--port {args.port}: {error.strerror}") from error
        if store.state.phase is EnginePhase.FAILED:
            raise BadConfiguration(store.state.message) from error
        logger.exception("the engine failed")
        sys.exit(1)
    finally:
        control.close()


if __name__ == "__main__":
    main()
