"""A worker process of this machine: `python -m fleet.worker WORK` reads tasks (one JSON object a line) and answers outcomes.

It ends when its input ends, so it never outlives who started it.
"""

import json
import os
import signal
import sys
from dataclasses import asdict

from runtime.console import start_logging

from .step import run_task
from .work import Task, Work


def main() -> None:
    """Answer tasks until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal goes to the run, which ends its workers
    start_logging()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # anything a library prints goes to stderr, never between outcomes
    work = Work.from_json(sys.argv[1])
    for line in sys.stdin:
        out.write(json.dumps(asdict(run_task(work, Task(**json.loads(line))))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
