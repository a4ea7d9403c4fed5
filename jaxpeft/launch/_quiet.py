"""What XLA writes on standard error when a process has gone, in one line.

XLA ends a process whose coordinator has died within C++, after some twenty lines and
a stack of calls: nothing in Python runs any more. So what C++ writes goes through a
small process of its own, which lives a moment longer and says the one line. What
Python writes does not.
"""

import logging
import os
import subprocess
import sys

GONE = (
    "another process of this run has stopped, and so does this one; the same command "
    "on all goes on after the last checkpoint"
)
# Runs as ``python -c``, without site-packages. argv[1] is who says the line.
_FILTER = r"""
import re, signal, sys
for each in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, each), signal.SIG_IGN)  # it ends when its input does
head = re.compile(r"^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w./]+):\d+\] ")
gone = "Terminating process because the JAX distributed service detected fatal errors"
about = re.compile(r"(coordination_\w+|preemption_\w+)\.cc$")
dropped = told = False
for line in sys.stdin.buffer:
    text = line.decode(errors="replace")
    found = head.match(text)
    if found:  # what follows until the next of these belongs to it
        fatal = gone in text
        dropped = fatal or bool(about.search(found[1]))
        if fatal and not told:
            told = True
            print(sys.argv[1], file=sys.stderr, flush=True)
    if not dropped:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


def quieten(program: str) -> None:
    """From now on, what C++ writes of a process that has gone is one line.

    Args:
        program: who says it.
    """
    said = f"{program}: error: {GONE}"
    before = sys.stderr
    before.flush()
    own = os.dup(2)
    command = [sys.executable, "-S", "-E", "-c", _FILTER, said]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    _READERS.append(reader)
    sys.stderr = os.fdopen(own, "w", buffering=1, errors="backslashreplace")
    for handler in logging.getLogger().handlers:
        if getattr(handler, "stream", None) is before:
            handler.setStream(sys.stderr)


_READERS: list[subprocess.Popen] = []  # one that nobody holds would be warned of
