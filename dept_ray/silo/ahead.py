"""`Early`: the first steps of a round, made before its order came; and what becomes of them when it does.

A silo that has answered stands at theta_k while its update travels and the outer step is made. Instead of waiting it
goes on from there, as the next order will say unless something happens (`expected_order`). What these steps moved is
then laid onto what the order brings, for all that is shared:

    theta_k <- theta_t + (theta_k after the steps ahead - theta_k at the end of the last round)

The rest of the round goes on from there, and equation (1) counts from theta_t: the steps ahead are in the delta. What
stays home is simply trained on. Which steps are made ahead is in the order (`RoundOrder.ahead`) and where they begin is
in the snapshot that it names, so they can be made again by anybody at any time, with the same bits: what was made of
them early saves time and decides nothing.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from dept_ray.config import Job
from dept_ray.messages import RoundOrder
from dept_ray.silo.inner import Trained
from dept_ray.silo.vectors import Vectors
from dept_ray.silo.wire import Shared
from dept_ray.text.stream import Position

_COURSE = ("after", "position", "first_step", "steps", "lr", "total_steps", "frozen_steps", "ahead")
"""All of an order that its steps ahead follow from."""


@dataclass(frozen=True, eq=False)
class Ahead:
    """Steps that were made early; the optimizer's moments after them are the silo's."""

    order: RoundOrder
    """As it was expected."""
    trained: Trained
    """Not always all of them: it may have been stopped."""
    reached: Shared
    """Body and rows after them, whether they are shared or stay home."""
    seconds: float

    def fits(self, order: RoundOrder) -> bool:
        """Whether these are steps of that order."""
        return all(getattr(order, fact) == getattr(self.order, fact) for fact in _COURSE)


class Early:
    """Of one silo.

    Args:
        job: as the silo knows it.
        vectors: its model's.
    """

    def __init__(self, job: Job, vectors: Vectors) -> None:
        self._job, self._vectors = job, vectors
        self._left: Shared = {}
        """What is shared as it was at the end of the last round, where steps are made ahead of their order."""
        self._expected: RoundOrder | None = None
        self._made: Ahead | None = None

    def expect(self, order: RoundOrder, snapshot: str, position: Position) -> None:
        """An order was obeyed, and led to this snapshot and position."""
        self._expected = expected_order(self._job, order, snapshot, position)

    def expected(self) -> RoundOrder | None:
        """What steps are to be made of, asked once; None: nothing."""
        order, self._expected = self._expected, None
        return order

    def make(self, order: RoundOrder, steps: Callable[[], Trained], clock: Callable[[], float]) -> None:
        """Make steps from where the silo left off. What stays home is then as it was: the order may want it scored."""
        began = clock()
        home = self._vectors.copies({"body", "rows"} - self._left.keys())
        self._vectors.take(self._left)
        trained, reached = steps(), self._vectors.copies(("body", "rows"))
        self._vectors.take(home)
        self._made = Ahead(order, trained, reached, clock() - began)

    def made_for(self, order: RoundOrder) -> Ahead | None:
        """What was made of the order that has come, if that was expected so; whatever was made is used up."""
        made, self._made, self._expected = self._made, None, None
        return made if made is not None and made.fits(order) else None

    @contextmanager
    def ahead_of(self, shared: Shared, made: Ahead | None) -> Iterator[None]:
        """Within, an order's other steps ahead are made; then what they moved is laid onto what is `shared` now."""
        self._vectors.take(self._left if made is None else made.reached)
        yield
        self._vectors.take(rebased(shared, self._left, self._vectors.copies(shared)))

    def leave(self, shared: Collection[str]) -> dict[str, torch.Tensor]:
        """What is `shared`, as it is now: of the snapshot, where it is needed."""
        if self._job.inner.ahead_steps:
            self._left = self._vectors.copies(shared)
        return {what: torch.from_numpy(vector) for what, vector in self._left.items()}

    def load(self, left: Mapping[str, torch.Tensor]) -> None:
        """What `leave` said after the same snapshot; of a fresh silo nothing."""
        self._left = {what: tensor.numpy() for what, tensor in left.items()}


def expected_order(job: Job, order: RoundOrder, snapshot: str, position: Position) -> RoundOrder | None:
    """The next round's order, unless people change something or the answer does not count.

    It bears the fence of the order that it follows: whoever stops that one stops its steps ahead.

    Args:
        job: as the silo knows it.
        order: what was just obeyed.
        snapshot, position: where that led.

    Returns:
        Without arrays; None: nothing is to be made ahead of it.
    """
    first, ahead = order.first_step + order.steps, min(job.inner.ahead_steps, order.steps)
    shares = order.body is not None or order.rows is not None
    if not (ahead and shares) or first >= order.total_steps:
        return None
    return replace(
        order.without_arrays(), after=snapshot, position=position, first_step=first, ahead=ahead,
        frozen_steps=order.steps if job.init.frozen_body else 0,
    )  # fmt: skip


def rebased(shared: Mapping[str, np.ndarray], left: Mapping[str, np.ndarray], reached: Shared) -> Shared:
    """Where a silo stands once an order has come: what it moved since it `left`, laid onto what is shared now.

    >>> now, left, reached = ({"body": np.float32(values)} for values in ([5, 5], [1, 2], [2, 2]))
    >>> rebased(now, left, reached)["body"].tolist()
    [6.0, 5.0]
    """
    return {what: vector + (reached[what] - left[what]) for what, vector in shared.items()}
