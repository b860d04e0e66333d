"""`resilientllm chaos`, once more, inside (``enclosure.py``)."""

from __future__ import annotations

import sys

from resilientllm_cli.main import run

sys.exit(run(["chaos", *sys.argv[1:]]))
