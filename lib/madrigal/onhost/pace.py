"""So many bytes a second, and no more."""

import time


class Pace:
    """Holds up who takes bytes, so that never more than RATE a second have been taken on average."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._began = time.monotonic()
        self._count = 0

    def took(self, count: int) -> None:
        """Wait until COUNT bytes more are due."""
        self._count += count
        wait = self._began + self._count / self._rate - time.monotonic()
        if wait > 0:
            time.sleep(wait)
