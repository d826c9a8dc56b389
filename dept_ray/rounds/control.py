"""What people ask of a run while it goes on; the loop looks between rounds."""

import threading


class Control:
    """Requests from other threads. One so far: to stop after the round in progress is committed."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the run after the next commit."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether someone asked to stop."""
        return self._stop.is_set()
