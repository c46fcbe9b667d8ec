"""Training processes that tests kill: forked from one that has everything imported, and killed after a step drawn at
random."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


def fork_for_each_line(work: Callable[[dict], None], warm_up: Callable[[dict], None]) -> None:
    """A child for each job (a line of JSON on stdin): prints its pid, then how it ended. `warm_up` gets the first
    job."""
    tqdm.monitor_interval = 0  # its thread could hold a lock at the moment of a fork
    tqdm.set_lock(threading.RLock())  # the default one is shared by all forks, and not given back by one that is killed
    for i, line in enumerate(sys.stdin):
        if i == 0:
            warm_up(json.loads(line))
        pid = os.fork()
        if pid == 0:
            status = 0
            try:
                work(json.loads(line))
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stderr.flush()
            os._exit(status)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


def kill_after(pid: int, step: Callable[[], int], until: int, delay: float) -> None:
    """SIGKILL a process `delay` seconds after its log has reached a step, unless it ended before."""
    while step() < until and Path(f"/proc/{pid}").exists():
        time.sleep(0.001)
    time.sleep(delay)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
