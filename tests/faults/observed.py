"""`python -m tests.faults.observed DIRECTORY START COMMAND...`, which torchrun can start.

It runs a command of megatron-post, and records in DIRECTORY the samples that the command trains on.
"""

import sys
from pathlib import Path

from megatron_post import cli
from tests.faults.injections import record_history

if __name__ == "__main__":
    directory, start, *command = sys.argv[1:]
    record_history(Path(directory), int(start))
    sys.argv[1:] = command
    cli.main()
