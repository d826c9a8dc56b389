"""What people ask of a run while it goes on. Asking returns at once; the loop obeys between rounds.

pause, resume, step(n)     hold the run after the round in progress; let it go on; let n rounds through
change(...)                set a key, add a source, drop a silo, let one return: checked at once, on record when it acts
checkpoint                 keep the round in progress (or, while the run is held, the last one) for good
stop                       end after the round in progress is committed

What was asked is kept in a file from the moment of asking until a committed round has heard it, so that a coordinator
that is killed comes back held, if it was held, and with every change that was promised to somebody.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from dept_ray.errors import RunError, StoreError
from dept_ray.messages import Change

Asked = dict[str, Any]
"""What is kept, as plain values: hold_at, stopping, keep_at, changes, first (the number of their first), heard."""

_REMEMBERED = 64
"""Requests whose ids are kept; who has no answer asks again within seconds."""


class Memory(Protocol):
    """Where what was asked is kept (`rounds.store.RunStore`)."""

    def asked(self) -> Asked | None:
        """What the life before left; None: nothing."""
        ...

    def keep_asked(self, asked: Asked) -> None:
        """Keep it, before anybody is told that it was heard."""
        ...


class Control:
    """Requests from other threads, and the loop's way to wait for them.

    Args:
        again: whether the run comes back by itself, so that a pause or a stop of the life before is still meant;
            somebody who starts it again means it to go on.
    """

    def __init__(self, again: bool = False) -> None:
        self._told = threading.Condition()
        self._again, self._memory, self._kept = again, None, Asked()
        self._stopping = self._waiting = self._spoken = self._over = False
        self._hold_at: int | None = None
        """Rounds from which on the run is held; until it begins, counted from there."""
        self._keep_at: int | None = None
        """Round to be kept for good once it is committed."""
        self._begun = 0
        """Rounds that were begun, committed or not."""
        self._changes: list[Change] = []
        """Those asked for that no committed round is known to have heard."""
        self._first = self._taken = 0
        """Numbers, among all changes ever asked of the run, of the first of them and of the first not taken yet."""
        self._heard: list[str] = []
        """The last requests by their ids: who asks again because the answer was lost has been heard."""

    # ------------------------------------------------------------------------------------------ for people
    def stop(self) -> None:
        """End the run after the next commit."""
        with self._told:
            if not self._over:
                with self._telling():
                    self._stopping = True

    def pause(self) -> None:
        """Hold the run after the round in progress."""
        with self._telling():
            self._hold_at, self._spoken = self._begun, True

    def resume(self) -> None:
        """Go on."""
        with self._telling():
            self._hold_at, self._spoken = None, True

    def step(self, rounds: int, request: str = "") -> None:
        """Let so many more rounds through, then hold."""
        with self._telling(request) as new:
            if new:
                held = self._begun if self._hold_at is None else max(self._hold_at, self._begun)
                self._hold_at, self._spoken = held + rounds, True

    def change(self, change: Change, request: str = "") -> None:
        """Ask for a change; the caller has checked it."""
        with self._telling(request) as new:
            if new:
                self._changes = [*self._changes, change]

    def checkpoint(self) -> int:
        """Keep a round for good: the one in progress or, where none is, the last one. Returns its number."""
        with self._telling():
            self._keep_at = max(1, self._begun)
            return self._keep_at

    @property
    def begun(self) -> int:
        """Rounds that were begun, the one in progress among them."""
        return self._begun

    def knows(self, request: str) -> bool:
        """Whether a request was heard already."""
        return request in self._heard

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
        return self._hold_at is not None and self._begun >= self._hold_at and not self._stopping

    @property
    def pending(self) -> list[Change]:
        """What was asked for and not taken yet."""
        with self._told:
            return self._changes[self._taken - self._first :]

    @property
    def asks(self) -> bool:
        """Whether people ask for anything, so that the loop, between two rounds, must not just go on."""
        with self._told:
            return self._stopping or self.holding or self._news

    def begin(self, round: int, heard: int, memory: Memory) -> None:
        """The run stands after so many rounds, which heard so many changes; from now on keep what is asked."""
        with self._told:
            self._over = False
            if self._memory is memory:
                return
            before, mine = memory.asked(), self._changes
            self._memory, self._begun, self._first, self._taken = memory, round, heard, heard
            if self._hold_at is not None:
                self._hold_at += round
            if before is not None:
                self._kept = before
                self._heard = [*before["heard"], *self._heard]
                self._changes = [*before["changes"][max(0, heard - before["first"]) :], *mine]
                self._keep_at = before["keep_at"] if self._keep_at is None else self._keep_at
                if self._again:
                    self._stopping = self._stopping or before["stopping"]
                if self._again and not self._spoken:  # nobody has said otherwise since it came back
                    self._hold_at = before["hold_at"]
            self._keep()

    def committed(self, heard: int) -> None:
        """A round is a fact that heard so many changes in all: they need not be kept any more."""
        with self._told:
            self._changes, self._first = self._changes[heard - self._first :], heard
            with suppress(StoreError):  # what is kept too long does no harm: the manifest says what was heard
                self._keep()

    def take_changes(self) -> list[Change]:
        """What was asked for since last time."""
        with self._told:
            changes = self._changes[self._taken - self._first :]
            self._taken += len(changes)
            return changes

    def take_checkpoint(self, round: int) -> bool:
        """Whether the last committed round is to be kept for good; told once."""
        with self._told:
            due = self._keep_at is not None and round >= self._keep_at
            self._keep_at = None if due else self._keep_at
            return due

    def wait_for_turn(self) -> None:
        """Return when a round may begin, when something else is to be done, or when the run is to end."""
        with self._told:
            self._waiting = True
            self._told.wait_for(lambda: not self.holding or self._news)
            self._waiting = False

    def begin_round(self) -> bool:
        """Whether a round may begin; it does, if so."""
        with self._told:
            if self._stopping or self.holding:
                return False
            self._begun += 1
            return True

    def end(self) -> bool:
        """Whether no change and no checkpoint is left to be made; if so nothing more can be asked."""
        with self._told:
            self._over = not self._news
            return self._over

    # ------------------------------------------------------------------------------------------ inside
    @property
    def _news(self) -> bool:
        due = self._keep_at is not None and self._begun >= self._keep_at
        return due or self._taken < self._first + len(self._changes)

    @contextmanager
    def _telling(self, request: str = "") -> Iterator[bool]:
        """Something is asked: it is kept before the asker is answered, or was never asked. Yields whether it is new."""
        with self._told:
            if self._over:
                raise RunError("the run has made its last round: start it again to go on with it")
            before = (self._stopping, self._hold_at, self._spoken, self._keep_at, self._changes, self._heard)
            new = request not in self._heard
            self._heard = [*self._heard, request][-_REMEMBERED:] if request and new else self._heard
            try:
                yield new
                self._keep()
            except StoreError:
                self._stopping, self._hold_at, self._spoken, self._keep_at, self._changes, self._heard = before
                raise
            self._told.notify_all()

    def _keep(self) -> None:
        asked = {
            "hold_at": self._hold_at, "stopping": self._stopping, "keep_at": self._keep_at,
            "first": self._first, "changes": self._changes, "heard": self._heard,
        }  # fmt: skip
        nothing = not (self._changes or self._keep_at or self._stopping or self._hold_at is not None)
        if self._memory is not None and asked != self._kept and (self._kept or not nothing):
            self._memory.keep_asked(asked)
            self._kept = asked
