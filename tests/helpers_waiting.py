"""Waiting for what another thread or process does. The limit is for a hang, not for a slow machine."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
