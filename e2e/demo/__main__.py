"""`make demo` and `make demo-down`: python -m e2e.demo up | status | down.

Exit status of ``up``: 0 only if every stream was complete and equal, token by token, to the undisturbed run; 1 if not,
or if a step failed (the cluster stays for a look); 2 wrong usage; 130 interrupted (the cluster is removed).
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from e2e.cluster.choose import PROVIDERS, provider
from e2e.cluster.errors import ClusterError
from e2e.cluster.launch import REPOSITORY

from . import choice, installation
from .picture import outcome_table, recovery_table, recovery_words
from .play import OBJECT, Play, Settings
from .report import Outcome, document, problems
from .screen import Screen

FOLDER = REPOSITORY / "build" / "demo"
RESULT = REPOSITORY / "build" / "demo.json"
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run: Callable[[argparse.Namespace], int] = chosen.run
        return run(chosen)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m e2e.demo", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    defaults = Settings()
    up = commands.add_parser("up", help="the whole demo; the cluster stays up afterwards")
    up.add_argument(
        "--provider",
        choices=PROVIDERS,
        help="what nodes are made of (default: kind where Docker works, else namespaces)",
    )
    up.add_argument(
        "--images",
        choices=("thin", "built"),
        help="thin: they run the files of this machine; built: by Docker from the Dockerfiles (default with kind)",
    )
    up.add_argument("--streams", type=_count, default=defaults.streams)
    up.add_argument("--tokens", type=_count, default=defaults.tokens, help="of each stream (default: %(default)s)")
    up.add_argument(
        "--stage", type=int, choices=(0, 1), default=defaults.stage, help="which one to kill (default: %(default)s)"
    )
    up.set_defaults(run=_up)
    commands.add_parser("status", help="what is up").set_defaults(run=_status)
    commands.add_parser("down", help="remove all that the demo made, but its result").set_defaults(run=_down)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)


def _up(chosen: argparse.Namespace) -> int:
    kind = chosen.provider or choice.usual()
    images = chosen.images or ("built" if kind == "kind" else "thin")
    settings = Settings(
        streams=chosen.streams, tokens=chosen.tokens, stage=chosen.stage, built_images=images == "built"
    )
    screen = Screen()
    try:
        # From nothing, or the time until Ready would be that of an earlier demo.
        choice.present().down()
        with screen:
            outcome = Play(provider(kind, choice.NAME), kind, FOLDER / "models", settings, screen).run()
    except KeyboardInterrupt:
        # A second Ctrl-C would leave half a cluster.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted: removing the cluster", file=sys.stderr)
        _remove()
        return INTERRUPTED
    except ClusterError:
        print(_how_to_look(), file=sys.stderr)
        raise
    return _tell(outcome, screen.console)


def _tell(outcome: Outcome, console: Console) -> int:
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(document(outcome), indent=2) + "\n")
    console.print("Every stream, token by token, against the undisturbed run:")
    console.print(outcome_table(outcome))
    if outcome.recovery is not None:
        console.print(recovery_words(outcome.recovery), markup=False, soft_wrap=True)
        console.print(recovery_table(outcome.kill, outcome.recovery))
    wrong = list(problems(outcome))
    for problem in wrong:
        console.print(f"FAILED: {problem}", markup=False)
    if not wrong:
        console.print(f"Every stream is equal to the undisturbed run. Ready after {outcome.ready_seconds:.0f} s.")
    console.print(f"The figures are in {RESULT.relative_to(REPOSITORY)}.")
    console.print(_how_to_look(), markup=False, soft_wrap=True)
    return 1 if wrong else 0


def _status(chosen: argparse.Namespace) -> int:
    cluster = choice.present().existing()
    print(_how_to_look())
    print(cluster.kubectl("get", "nodes"), end="")
    print(cluster.kubectl("get", "rllm,pods", f"--namespace={installation.NAMESPACE}", "--output=wide"), end="")
    return 0


def _down(chosen: argparse.Namespace) -> int:
    _remove()
    return 0


def _remove() -> None:
    choice.present().down()
    if FOLDER.exists():
        shutil.rmtree(FOLDER)


def _how_to_look() -> str:
    try:
        cluster = choice.present().existing()
    except ClusterError:
        return "No cluster was left."
    # The machine may have no kubectl, and the plugin is in the environment.
    programs = (REPOSITORY / ".venv" / "bin", Path(cluster.kubectl_command()[0]).parent)
    return (
        "The cluster is still up. To look at it:\n"
        f"  export KUBECONFIG={cluster.kubeconfig} PATH={':'.join(map(str, programs))}:$PATH\n"
        f"  kubectl resilientllm status {OBJECT}; kubectl describe rllm {OBJECT}; kubectl get pods -o wide\n"
        "To remove it: make demo-down"
    )


if __name__ == "__main__":
    sys.exit(main())
