"""Run a command that does not outlive the process that asked for it: ``python -m secateur.lifeline PARENT WORDS...``.

Where a worker of a cluster is killed, what it started would go on alone, and meet its own second try in the same
folder.  On Linux the kernel ends it with the worker; elsewhere only the lock of the cell keeps the two apart.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def main(words: list[str]) -> None:
    """Tie this process to its parent, whose number is the first word, and become the command in the others."""
    parent, *command = words
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(WITH_PARENT, signal.SIGKILL)
        if os.getppid() != int(parent):  # it died before the tie
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
