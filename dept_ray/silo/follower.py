"""A rank of a silo other than the first: it joins, trains along with every order, and ends with rank 0.

It saves, scores and answers nothing, and it begins each order with a copy of what rank 0 has. A child process of rank 0
runs this module.
"""

import itertools
import json
import os
import sys
import threading
import traceback
from contextlib import closing, suppress
from datetime import timedelta
from typing import Any

from dept_ray.config import Job
from dept_ray.errors import discreet
from dept_ray.messages import RoundOrder, SiloSpec
from dept_ray.silo.memory import keep_freed_memory
from dept_ray.silo.rank import Rank
from dept_ray.silo.team import join, open_store

_PATIENCE = timedelta(days=20)
"""What one wait for an order may last: a run may be held for long. Longer ones overflow a counter of milliseconds."""
_MEET_S = 60.0


def follow(port: int, rank: int) -> None:
    """Be that rank of the silo whose rank 0 is met at a port of this machine; returns when rank 0 is gone."""
    store = open_store(port, _MEET_S)
    job = Job.model_validate_json(store.get("job"))
    told = json.loads(store.get("spec"))
    spec = SiloSpec(**told | {"sources": tuple(told["sources"])})
    try:
        with closing(Rank(job, spec, rank)) as ours:
            store.set(f"here/{rank}", "")
            team = join(store, rank, spec.ranks, spec.gpu, job.faults.start_timeout_s)
            for number in itertools.count(1):
                if (told := _order(store, number)) is None:
                    return
                order = RoundOrder(**told["order"] | {"keep": ()})
                ours.follow(order, told["moments"], team)
    except Exception as err:  # noqa: BLE001 - rank 0 is told, and it fails with this reason
        traceback.print_exc()
        _tell(store, f"failed/{rank}", _words(err))


def _words(err: Exception) -> str:
    """What rank 0 is told. Nothing of the error stays here: what its frames hold are this rank's connections."""
    told = discreet(err)
    return f"{type(told).__name__}: {told}"


def _tell(store: Any, key: str, value: str) -> None:
    from torch.distributed import DistNetworkError

    with suppress(DistNetworkError):  # nobody is left to be told
        store.set(key, value)


def _order(store: Any, number: int) -> Any:
    """The next order; None where nobody is left to give it."""
    from torch.distributed import DistNetworkError, DistStoreError

    while True:
        try:
            store.wait([f"order/{number}"], _PATIENCE)
            return json.loads(store.get(f"order/{number}"))
        except DistStoreError:  # still none
            continue
        except DistNetworkError:
            return None


def _end_with_parent() -> None:
    """Whatever this process is doing: its input is a pipe that closes when its parent dies."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    follow(int(sys.argv[1]), int(sys.argv[2]))
