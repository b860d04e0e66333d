"""The `resilientllm` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from resilientllm_cli import tiny_model
from resilientllm_cli.bench import command as bench_command
from resilientllm_cli.chaos import command as chaos_command
from resilientllm_cli.errors import UsageError
from resilientllm_cli.local import command as local_command
from resilientllm_cli.status import command as status_command

USAGE_ERROR = 2
INTERRUPTED = 130
"""As a shell says it of a program that Ctrl-C has ended."""
EPILOG = """exit codes: 0 done, and all is well; 1 done, and it is not: bench or chaos found a token lost, duplicated
or changed, or another problem; an instance that status shows is not whole; local down took too long; 2 wrong arguments
or surroundings, with a line that says what to do; 130 interrupted, and tidied up."""


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(words: Sequence[str]) -> int:
    """What follows ``--`` is passed on to vLLM unread."""
    own, passed_on = _split(words)
    arguments = _parser().parse_args(own)
    arguments.passed_on = passed_on
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except UsageError as error:
        print(f"resilientllm: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("resilientllm: interrupted", file=sys.stderr)
        return INTERRUPTED


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    own = list(words)
    if "--" not in own:
        return own, []
    at = own.index("--")
    return own[:at], own[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resilientllm",
        description="Keeps LLM inference alive when GPUs and nodes die.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_make_tiny_model(commands)
    local_command.add_parser(commands)
    status_command.add_parser(commands)
    bench_command.add_parser(commands)
    chaos_command.add_parser(commands)
    return parser


def _add_make_tiny_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("make-tiny-model", help="write a tiny random model for tests, the demo and benchmarks")
    parser.add_argument("directory", type=Path)
    defaults = tiny_model.TinyModel()
    for name in ("layers", "hidden", "heads", "kv_heads", "intermediate", "max_model_len", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.set_defaults(run=_make_tiny_model)


def _make_tiny_model(arguments: argparse.Namespace) -> int:
    shape = tiny_model.TinyModel(
        layers=arguments.layers,
        hidden=arguments.hidden,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        intermediate=arguments.intermediate,
        max_model_len=arguments.max_model_len,
        seed=arguments.seed,
    )
    tiny_model.write_tiny_model(arguments.directory, shape)
    return 0
