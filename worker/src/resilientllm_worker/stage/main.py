"""``resilientllm-stage``: one pipeline stage as a process."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from resilientllm_worker.process import add_common_flags, end_at_once, host_and_port, read_token, run_command
from resilientllm_worker.seams.launch import BadConfiguration, config_digest, make_config, make_parser, prepare
from resilientllm_worker.stage import watchdog
from resilientllm_worker.stage.background import run_nicely
from resilientllm_worker.stage.health import HealthServer, NotReady
from resilientllm_worker.stage.metrics import StageMetrics, WeightsMetrics, make_registry

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from resilientllm_worker.protocol.messages import WeightsHello
    from resilientllm_worker.stage.model import Model
    from resilientllm_worker.stage.ranks import Followers
    from resilientllm_worker.stage.server import StageServer
    from resilientllm_worker.stage.weights import StageWeights
    from resilientllm_worker.transport.connection import Connection

PROGRAM = "resilientllm-stage"
LEAVE_SECONDS = 25.0
"""Kubernetes kills a process 30 s after SIGTERM unless it is told otherwise, and ending takes a moment."""

logger = logging.getLogger(__name__)


def main() -> None:
    run_command(PROGRAM, _run)


def _run() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = run_nicely(_parse)
    if args.follow:
        _follow(args)
        end_at_once(0)
    token = read_token(args.token_file)
    report: dict[str, object] = {}
    server: StageServer | None = None
    health_host, health_port = args.health

    def ready() -> dict[str, object] | NotReady:
        if not report or server is None:
            return NotReady("it has no weights yet")
        _, seconds, allowed = server.step_at_hand()
        if seconds > allowed:
            return NotReady(f"a step has been running for {seconds:.1f} s, {allowed:.1f} s are allowed")
        return {**report, "counts": server.counts}

    registry = make_registry()
    try:
        health = HealthServer(health_host, health_port, ready, registry)
    except OSError as error:
        raise BadConfiguration(f"--health {health_host}:{health_port}: {error.strerror}") from error

    from vllm.utils.network_utils import get_file_store_init_method

    init_method = get_file_store_init_method()
    followers = _start_followers(args, init_method)
    try:
        model, digest, weights = run_nicely(lambda: _load(args, init_method, followers, token))
    except BadConfiguration:
        raise
    except Exception:
        logger.exception("stage %d.%d cannot load", args.instance, args.stage)
        end_at_once(1)  # an interpreter with half a model in it may not come to its end
    model.adopt_thread()

    from resilientllm_worker.stage.server import StageServer, listen

    def give(connection: Connection, hello: WeightsHello) -> None:
        if followers is None or hello.rank not in followers.ranks:
            weights.give(connection, hello)
        else:
            followers.give(connection, hello)

    server = StageServer(
        model, args.instance, args.stage, digest, token, args.pool_fraction, merges=not args.take_turns, give=give
    )
    of = f"{args.instance}.{args.stage}"
    registry.register(StageMetrics(of, lambda: server.figures))
    registry.register(WeightsMetrics(of, *weights.figures))
    host, port = args.listen
    try:
        listener = listen(server, host, port, token)
    except OSError as error:
        raise BadConfiguration(f"--listen {host}:{port}: {error.strerror}") from error
    pids = [os.getpid(), *(followers.pids if followers else [])]
    report.update(
        ready=True,
        instance=args.instance,
        stage=args.stage,
        ranks=[{"rank": rank, "pid": pid} for rank, pid in enumerate(pids)],
        address=listener.address,
        weights=weights.report(),
    )
    logger.info("stage %d.%d has its weights and listens on %s", args.instance, args.stage, listener.address)
    leave_on_sigterm(server, args.leave_timeout)
    watchdog.watch(server.step_at_hand, watchdog.end_process)
    try:
        server.run()
    except KeyboardInterrupt:
        logger.info("stopping")
    except Exception as error:
        # Whatever vLLM raised, its runner is in an unknown state: a new process is the only safe answer.
        logger.exception("stage %d.%d failed", args.instance, args.stage)
        server.fail(f"{type(error).__name__}: {error}")
        listener.close()
        end_at_once(1)
    listener.close()
    health.close()
    if followers is not None:
        followers.close()
    # Where the ranks met: torch removes it when the interpreter is taken apart, which ours is not.
    Path(init_method.removeprefix("file://")).unlink(missing_ok=True)
    end_at_once(0)


def leave_on_sigterm(server: StageServer, timeout_seconds: float) -> None:
    """From now on SIGTERM ends the stage when no instance needs it any more; a second one, or SIGINT, at once."""

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # The thread that this interrupts may be holding the server's lock.
        threading.Thread(target=server.leave, args=(timeout_seconds,), name="leave", daemon=True).start()

    signal.signal(signal.SIGTERM, leave)


def _parse() -> argparse.Namespace:
    parser = make_parser(PROGRAM, "Serve one pipeline stage. Takes every flag of `vllm serve`, as its engine does.")
    group = add_common_flags(parser)
    group.add_argument("--stage", type=int, required=True, help="place in the pipeline, from 0")
    group.add_argument(
        "--listen", type=host_and_port, required=True, metavar="HOST:PORT", help="for engines and stages"
    )
    group.add_argument(
        "--health", type=host_and_port, required=True, metavar="HOST:PORT", help="for /healthz, /readyz and /metrics"
    )
    group.add_argument(
        "--pool-fraction",
        type=float,
        default=1.0,
        help="KV blocks for guests, as a fraction of the blocks for the stage's own instance (default: %(default)s)",
    )
    group.add_argument(
        "--leave-timeout",
        type=float,
        default=LEAVE_SECONDS,
        metavar="SECONDS",
        help="how long the stage serves on after SIGTERM, if instances still need it (default: %(default)s)",
    )
    group.add_argument(
        "--weights-from",
        type=_addresses,
        default=(),
        metavar="HOST:PORT[,HOST:PORT...]",
        help="stages that may have this stage's weights: copies of it, in other instances. Asked in this order while "
        "this one starts; if none gives them, they are loaded from storage",
    )
    group.add_argument(
        "--lend-weights",
        action="store_true",
        help="give this stage's weights to its copies that ask for them. Costs no memory on a GPU; on a CPU as much "
        "again as the weights, since vLLM packs the ones that it works with",
    )
    group.add_argument("--take-turns", action="store_true", help=argparse.SUPPRESS)  # to measure what merging is worth
    group.add_argument("--follow", help=argparse.SUPPRESS)  # makes this process another rank of a running stage
    args = parser.parse_args()
    if not 0.0 <= args.pool_fraction <= 4.0:
        raise BadConfiguration(f"--pool-fraction: expected 0 to 4, got {args.pool_fraction}")
    if not 0.0 <= args.leave_timeout <= 86_400.0:
        raise BadConfiguration(f"--leave-timeout: expected 0 to 86400 seconds, got {args.leave_timeout}")
    if not 0 <= args.stage < args.pipeline_parallel_size:
        raise BadConfiguration(f"--stage: expected 0 to {args.pipeline_parallel_size - 1}, got {args.stage}")
    return args


def _follow(args: argparse.Namespace) -> None:
    """Be another rank of the stage that started this process."""
    from resilientllm_worker.stage.model import Model
    from resilientllm_worker.stage.ranks import end_with_parent, follow, parse_follow
    from resilientllm_worker.weights.hand_over import serve_handed_over

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for rank 0, which ends this one
    end_with_parent()
    rank, sock, handed_over, init_method = parse_follow(args.follow)

    def load() -> tuple[Model, StageWeights]:
        prepare(args)
        config = make_config(args)
        weights = _weights(args, config, rank, read_token(args.token_file))
        model = Model(config, args.stage, rank)
        model.load(init_method)
        return model, weights

    model, weights = run_nicely(load)
    model.adopt_thread()
    weights.tell()
    serve_handed_over(handed_over, weights.give)
    follow(model, sock)


def _start_followers(args: argparse.Namespace, init_method: str) -> Followers | None:
    if args.tensor_parallel_size == 1:
        return None
    from resilientllm_worker.stage.ranks import Followers, own_command

    return Followers(own_command(), args.tensor_parallel_size, init_method)


def _load(
    args: argparse.Namespace, init_method: str, followers: Followers | None, token: bytes
) -> tuple[Model, str, StageWeights]:
    """The model with its weights, the digest of the settings that it was loaded under, and where they came from."""
    prepare(args)
    config = make_config(args)
    digest = config_digest(config)

    from resilientllm_worker.stage.model import Model
    from resilientllm_worker.stage.ranks import LeadingModel

    weights = _weights(args, config, 0, token)
    model = Model(config, args.stage, rank=0) if followers is None else LeadingModel(config, args.stage, followers)
    model.load(init_method)
    weights.tell()
    return model, digest, weights


def _weights(args: argparse.Namespace, config: VllmConfig, rank: int, token: bytes) -> StageWeights:
    from resilientllm_worker.stage.weights import StageWeights

    return StageWeights(config, args.stage, rank, args.weights_from, token, args.lend_weights)


def _addresses(text: str) -> tuple[str, ...]:
    """An argparse type: one ``HOST:PORT`` or more, with commas in between."""
    addresses = tuple(text.split(","))
    for address in addresses:
        host_and_port(address)
    return addresses


if __name__ == "__main__":
    main()
