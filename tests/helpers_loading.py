"""What worker processes of a DataLoader load while a thread of this process reads. A worker imports this module: keep
that quick."""

import threading
from collections.abc import Callable


class Collate:
    """Reads in whichever process is asked: the points of some streamlines and, if a volume is named, the sum over
    it."""

    def __init__(self, dataset, volume: str | None = None):
        self.dataset, self.volume = dataset, volume

    def __call__(self, items):
        subjects = [self.dataset.subject(name) for name, _ in items]
        return [
            (
                s.streamlines["streamlines"].get(ids).points,
                float(s.volumes[self.volume].volume.data.sum()) if self.volume else 0.0,
            )
            for s, (_, ids) in zip(subjects, items, strict=True)
        ]


def loaded_beside(
    reads_right: Callable[[], bool], items: list, collate: Collate, *, pause: float = 0, **options
) -> list:
    """All items from a DataLoader's workers, while a thread of this process calls `reads_right` again and again."""
    from torch.utils.data import DataLoader

    stop, wrong = threading.Event(), []

    def keep_reading():
        while not stop.wait(pause):
            if not reads_right():
                wrong.append(1)

    thread = threading.Thread(target=keep_reading)
    thread.start()
    try:
        got = [x for batch in DataLoader(items, collate_fn=collate, timeout=100, **options) for x in batch]
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive() and not wrong and len(got) == len(items)
    return got
