"""What people ask of a run while it goes on. Asking returns at once; the loop obeys between rounds.

pause, resume, step(n)     hold the run after the round in progress; let it go on; let n rounds through
change(...)                set a key, add a source, drop a silo, let one return: checked at once, on record when it acts
stop                       end after the round in progress is committed
"""

import threading

from dept_ray.config import Change


class Control:
    """Requests from other threads, and the loop's way to wait for them."""

    def __init__(self) -> None:
        self._told = threading.Condition()
        self._stopping = self._paused = self._waiting = False
        self._steps = 0
        self._changes: list[Change] = []

    # ------------------------------------------------------------------------------------------ for people
    def stop(self) -> None:
        """End the run after the next commit."""
        with self._told:
            self._stopping = True
            self._told.notify_all()

    def pause(self) -> None:
        """Hold the run after the round in progress."""
        with self._told:
            self._paused, self._steps = True, 0

    def resume(self) -> None:
        """Go on."""
        with self._told:
            self._paused = False
            self._told.notify_all()

    def step(self, rounds: int) -> None:
        """Let so many more rounds through, then hold."""
        with self._told:
            self._paused = True
            self._steps += rounds
            self._told.notify_all()

    def change(self, change: Change) -> None:
        """Ask for a change; the caller has checked it."""
        with self._told:
            self._changes.append(change)
            self._told.notify_all()

    # ------------------------------------------------------------------------------------------ for the loop
    @property
    def stopping(self) -> bool:
        """Whether someone asked to stop."""
        return self._stopping

    @property
    def paused(self) -> bool:
        """Whether the run does wait: no round is in progress."""
        return self._waiting and self.holding

    @property
    def holding(self) -> bool:
        """Whether the run would wait now."""
        return self._paused and not self._steps and not self._stopping

    def take_changes(self) -> list[Change]:
        """What was asked for since last time."""
        with self._told:
            changes, self._changes = self._changes, []
            return changes

    def wait_for_turn(self) -> None:
        """Return when a round may begin, when something is to be changed, or when the run is to end."""
        with self._told:
            self._waiting = True
            self._told.wait_for(lambda: not self.holding or self._changes)
            self._waiting = False

    def begin_round(self) -> bool:
        """Whether a round may begin; counts it against the steps that were let through."""
        with self._told:
            if self._stopping or self.holding:
                return False
            self._steps = max(0, self._steps - 1)
            return True
