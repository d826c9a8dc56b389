"""The ranks of one silo on a cluster: a placement group that holds room for all of them on one node, and their actors.

Rank 0 is the silo's own actor, which `places` makes; the others are its children, made by it and dead with it. What
they do is `silo.follower`.
"""

from typing import Any

import ray
from ray.util import get_current_placement_group, placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dept_ray.config import Resources
from dept_ray.messages import SiloSpec
from dept_ray.silo.crew import QUIET


def room_for(resources: Resources) -> PlacementGroup:
    """Room for a silo's ranks; on one node, where their GPUs have the fastest way to each other."""
    ranks = resources.processes
    share = {"GPU": resources.num_gpus / ranks, "CPU": resources.num_cpus / ranks}
    # Nothing cannot be reserved, and a byte stands in nobody's way.
    bundle = {what: amount for what, amount in share.items() if amount} or {"memory": 1}
    labels: Any = [resources.labels] * ranks if resources.labels else None
    return placement_group([bundle] * ranks, strategy="STRICT_PACK", bundle_label_selector=labels)


def place_in(room: PlacementGroup, rank: int) -> dict[str, Any]:
    """Options of the actor of a rank."""
    bundle = room.bundle_specs[rank]
    strategy = PlacementGroupSchedulingStrategy(room, rank, placement_group_capture_child_tasks=False)
    return {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": strategy}


class FollowerActor:
    """A rank in a process of its own."""

    def follow(self, port: int, rank: int) -> None:
        from dept_ray.silo.follower import follow

        follow(port, rank)


class _Actors:
    """Children of the actor that makes them, in the placement group that it is in."""

    def __init__(self, port: int, spec: SiloSpec) -> None:
        room, as_actor = get_current_placement_group(), ray.remote
        assert room is not None, "a silo with ranks is placed in a group"
        made: Any = as_actor(FollowerActor)
        self.actors = [
            made.options(runtime_env={"env_vars": QUIET}, **place_in(room, rank)).remote()
            for rank in range(1, spec.ranks)
        ]
        self.done = [actor.follow.remote(port, rank) for rank, actor in enumerate(self.actors, 1)]

    def gone(self) -> bool:
        return bool(ray.wait(self.done, timeout=0)[0])

    def end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


start_actors = _Actors
"""What starts the other ranks of a silo, from within its actor (`silo.crew.Start`)."""
