"""`Ahead`: the first steps of a round, made before its order came; and what becomes of them when it does.

A silo that has answered stands at theta_k while its update travels and the outer step is made. Instead of waiting it
goes on from there, as the next order will say unless something happens (`expected_order`). What these steps moved is
then laid onto what the order brings, for all that is shared:

    theta_k <- theta_t + (theta_k after the steps ahead - theta_k at the end of the last round)

The rest of the round goes on from there, and equation (1) counts from theta_t: the steps ahead are in the delta. What
stays home is simply trained on. Which steps are made ahead is in the order (`RoundOrder.ahead`) and where they begin is
in the snapshot that it names, so they can be made again by anybody at any time, with the same bits: what was made of
them early saves time and decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from dept_ray.config import Job
from dept_ray.messages import RoundOrder
from dept_ray.silo.inner import Trained
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
