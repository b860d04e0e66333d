"""Becomes another program, after telling the warden of it. Run as a script: ``leash.py FD PROGRAM ARGUMENT…``

FD is the write end of the warden's pipe. The warden sees end-of-file only when the supervisor *and* every process on
its way to ``exec`` have closed it, so whenever the supervisor dies, the warden knows of every child there is.
Imports nothing but the standard library: it runs before every child.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    lifeline, program = int(sys.argv[1]), sys.argv[2:]
    os.write(lifeline, f"+{os.getpid()}\n".encode())
    os.close(lifeline)
    try:
        os.execvp(program[0], program)
    except OSError as error:
        print(f"cannot run {program[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
