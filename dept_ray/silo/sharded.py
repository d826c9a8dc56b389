"""`Sharded`: where a model is too much for one GPU, each rank holds a shard of it while steps are made: torch's FSDP.

For N parameters and n ranks, a rank holds 16 N / n bytes of weights, gradients and moments (`fully_shard`; Zhao et al.,
arXiv 2304.11277), and in full whatever is computed at the moment: one block, which travels before its forward and its
backward pass and whose gradient travels after it; and from first to last the embedding with all norms, which are small.
Blocks travel and compute in bf16, where autocast would cast them anyway (autocast's own copies would all be kept until
the backward pass); norms and the embedding stay fp32, so that the numbers are those of one rank.

Shards live from the first to the last step of an order. Between orders rank 0 has the whole model, on the host (on its
GPU, in bf16 where it computes in that, while it is scored), with moments where they are kept; so files, messages and
scores know of no shards, and a rank that is lost costs the order. Of the flat vectors each `Shard` knows its place.

torch asks for its default process group, of which a process has one: silos with shards need a process each.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor import Shard as AlongFirstAxis

from dept_ray.silo.compiling import LossOf, compiled_loss_of_cut, first_pass
from dept_ray.silo.learner import Learner, new_model
from dept_ray.silo.model import LanguageModel
from dept_ray.silo.optimizer import AdamW, Group, l2_norm
from dept_ray.silo.parts import there
from dept_ray.silo.team import Team

_CUT = [AlongFirstAxis(0)]


@dataclass
class Shard(Group):
    """One parameter, of which each rank holds and steps some rows."""

    summed: bool = True
    offset: int = 0
    """Where it begins in the flat whole of its kind."""

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def divided(self) -> bool:
        return True

    @property
    def stepped(self) -> torch.Tensor:
        mine = self._cut.to_local().detach()
        if self._cut.grad is not None:
            mine.grad = _as_cut(self._cut.grad).to_local()
        return mine

    def norm(self) -> torch.Tensor:
        squares = l2_norm(self._cut.to_local().detach()).square()
        return DTensor.from_local(squares, self._cut.device_mesh, [Partial()], run_check=False).full_tensor().sqrt()

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of this parameter in the whole of its kind."""
        size = math.prod(self.tensor.shape)
        return whole.detach().view(-1)[self.offset : self.offset + size].view(self.tensor.shape)

    @property
    def _cut(self) -> DTensor:
        return _as_cut(self.tensor)


class Sharded:
    """This rank's shard, for one order.

    Args:
        learner: this rank's; its model has values on rank 0 alone.
        team: all ranks.
        compiled: whether this team has compiled what another order's shards were computed by, which serves again.

    Raises:
        SiloError: this process has another silo with shards.
    """

    def __init__(self, learner: Learner, team: Team, compiled: bool) -> None:
        self._learner, self.team = learner, team
        self._device = learner.hardware.device
        self._mesh = team.mesh(learner.hardware.device_type)
        self.model: LanguageModel = _cut_model(learner, self._mesh)
        self.to_compile = learner.hardware.compile and not compiled
        self.loss_of: LossOf = compiled_loss_of_cut(self.model) if learner.hardware.compile else self.model.loss
        self._groups = list(self._shards())
        self.optimizer = AdamW([*self._groups], learner.job.inner.betas, learner.job.inner.eps)

    def compile(self) -> None:
        """All ranks together: each waits for the others' shards."""
        hardware, inner = self._learner.hardware, self._learner.job.inner
        first_pass(self.loss_of, self.optimizer.tensors, (hardware.micro_batch, inner.context), hardware.autocast)
        self.to_compile = False

    def spread(self, team: Team) -> None:
        wholes = {group.kind: group for group in self._learner.optimizer.groups}
        for shard in self._groups:
            _as_cut(shard.tensor).to_local().detach().copy_(self._part(shard, wholes[shard.kind].tensor))
            for key, moment in self._learner.optimizer.moments.get(shard.kind, {}).items():
                kept = self.optimizer.moments.setdefault(shard.name, {})
                if moment.dim():
                    kept[key] = self._part(shard, moment)
                else:
                    kept[key] = there(moment, self._device, copy=True)
                    team.copy_from(0, [kept[key]])

    def gather(self, team: Team) -> None:
        learner = self._learner
        for shard in self._groups:
            (whole,) = (group.tensor for group in learner.optimizer.groups if group.kind == shard.kind)
            self._collect(shard, _as_cut(shard.tensor.detach()), whole)
            if learner.keeps_moments:
                self._collect_moments(shard, whole)

    def release(self) -> None:
        """Give its memory back, whoever refers to it still: torch's modules refer to themselves in circles."""
        for shard in self._groups:
            mine = shard.stepped
            for tensor in (mine, mine.grad, *self.optimizer.moments.get(shard.name, {}).values()):
                if tensor is not None:
                    tensor.untyped_storage().resize_(0)
        if self._mesh.device_type == "cuda":
            torch.cuda.empty_cache()

    def _collect_moments(self, shard: Shard, whole: torch.Tensor) -> None:
        moments = self._learner.optimizer.moments.setdefault(shard.kind, {})
        for key, mine in self.optimizer.moments[shard.name].items():
            if not mine.dim():
                moments[key] = mine.to("cpu", copy=True)
                continue
            if key not in moments:
                moments[key] = torch.empty_like(whole)
            shape, stride = shard.tensor.shape, shard.tensor.stride()
            cut = DTensor.from_local(mine, self._mesh, _CUT, run_check=False, shape=shape, stride=stride)
            self._collect(shard, cut, moments[key])

    def _part(self, shard: Shard, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a parameter, or of a moment, that rank 0 has."""
        full = there(shard.of(whole), self._device)
        return distribute_tensor(full, self._mesh, _CUT, src_data_rank=0).to_local()

    def _collect(self, shard: Shard, cut: DTensor, whole: torch.Tensor) -> None:
        full = cut.full_tensor()
        if self.team.rank == 0:
            shard.of(whole).copy_(full)

    def _shards(self) -> Iterator[Shard]:
        """Of all parameters, in the order of the flat vectors."""
        named = dict(self.model.named_parameters())
        layout = self._learner.layout
        decay = {"matrices": self._learner.job.inner.weight_decay}
        places = [("tokens", "embedding.tokens", 0), ("positions", "embedding.positions", 0)]
        for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
            matrix = len(shape) > 1
            places.append(("matrices", f"body.{name}", offset) if matrix else
                          ("vectors", f"body.{name}", offset - layout.matrix_size))  # fmt: skip
        for kind, name, offset in places:
            if name in named:
                yield Shard(f"{kind}.{name}", named[name], decay.get(kind, 0.0), offset=offset)


def _cut_model(learner: Learner, mesh: Any) -> LanguageModel:
    """The learner's model in shards, without values."""
    model = new_model(learner.job, learner.vocabulary_size, "meta")
    cast = torch.bfloat16 if learner.hardware.autocast else None
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # What a block returns is a view, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in model.body.blocks:
        fully_shard([block.attention, block.mlp], mesh=mesh, mp_policy=policy)  # pyright: ignore
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # losses are divided by the whole batch's tokens, so gradients are summed
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("loss", "loss_by", "hidden"):
        register_fsdp_forward_method(model, method)
    return model.to_empty(device=learner.hardware.device)


def _as_cut(tensor: Any) -> DTensor:
    assert isinstance(tensor, DTensor)
    return tensor
