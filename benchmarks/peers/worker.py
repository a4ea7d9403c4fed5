"""The protocol of a worker: commands as JSON lines in, answers as JSON lines out.

``{"steps": n}`` runs n steps and answers
``{"seconds": ..., "processor": ..., "result": ...}``: time on the clock, and processor
time of all of the process's threads;
``{"memory": true}`` answers the peak of the process's memory since it was built, over
what it held before the model was there.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def resident(what: str = "VmRSS") -> int:
    """Bytes of memory of this process; ``"VmHWM"``: the most it ever held."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(what + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what} in /proc/self/status: this benchmark needs Linux")


def serve(build: Callable[[dict], Callable[[], Any]]) -> None:
    """Builds the step that the first line describes, then answers commands.

    ``settings["core"]``, if given, is the one core that the process runs on.

    Args:
        build: ``settings -> step``; ``step()`` trains once and returns the loss, or
            writes once and returns the tokens.
    """
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    settings = json.loads(sys.stdin.readline())
    if settings.get("core") is not None:  # before any library counts the cores
        os.sched_setaffinity(0, {settings["core"]})
    before = resident()
    step = build(settings)
    first = step()
    step()
    say = lambda answer: print(json.dumps(answer), file=out, flush=True)
    say({"result": first})
    for line in sys.stdin:
        command = json.loads(line)
        if "memory" in command:
            say({"bytes": resident("VmHWM") - before})
            continue
        start, used = time.perf_counter(), time.process_time()
        for _ in range(command["steps"]):
            result = step()
        used = time.process_time() - used
        seconds = time.perf_counter() - start
        say({"seconds": seconds, "processor": used, "result": result})
