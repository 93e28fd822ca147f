"""`python -m softcache` is the command `softcache`, also for what starts modules: `torchrun -m softcache train-student
…`."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] == [
    os.getcwd()
]:  # `-m` puts the current folder first; main() puts it last
    del sys.path[0]

from softcache.stages.cli import main

if __name__ == "__main__":
    main()
