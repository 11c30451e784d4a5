"""Claims a run's folder until its standard input ends, as a sweep does while it carries out the run."""

import sys
from pathlib import Path

from tenslora.harness.run_folder import RunFolder

if __name__ == "__main__":
    with RunFolder(Path(sys.argv[1])).claim() as ours:
        assert ours
        print("claimed", flush=True)
        sys.stdin.read()
