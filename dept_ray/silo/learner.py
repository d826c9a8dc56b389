"""`Learner`: what training changes in a silo: the model, its flat body, and the optimizer's moments.

It is drawn, put into a snapshot's parts and read from them. What is ordered, read, sent and saved is `silo`'s to know.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from dept_ray.config import Job
from dept_ray.messages import SiloSpec
from dept_ray.silo.fresh import drawn_embedding, fresh_body
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.inner import make_optimizer
from dept_ray.silo.model import Body, Embedding, LanguageModel, flatten_gradients, flatten_parameters, layout_of
from dept_ray.silo.optimizer import Optimizer
from dept_ray.silo.parts import divide
from dept_ray.silo.snapshot import Parts
from dept_ray.silo.vectors import Vectors


class Learner:
    """Of one silo, on one of its ranks.

    Args:
        job, spec: what the silo was made of.
        hardware: where the model is, and what of its state is cut among the ranks.
        vocabulary_size: rows of its embedding.
        rank: 0 has the whole model; where all is cut, the others have no values.
    """

    def __init__(self, job: Job, spec: SiloSpec, hardware: Hardware, vocabulary_size: int, rank: int = 0) -> None:
        self.job, self.spec, self.hardware, self.vocabulary_size = job, spec, hardware, vocabulary_size
        self.layout = layout_of(job.model)  # pyright: ignore[reportArgumentType] - a frozen section has a hash
        self._rank = rank
        self.model = new_model(job, vocabulary_size, "meta" if rank and hardware.shard == "all" else hardware.home)
        self.body = flatten_parameters(self.model.body, self.layout)
        # Where all is cut, gradients are the shards' alone.
        self._body_grad = None if hardware.shard == "all" else flatten_gradients(self.model.body, self.layout)
        self.vectors = Vectors(spec.silo, self.model, self.body)
        self.optimizer = self._new_optimizer()

    @property
    def keeps_moments(self) -> bool:
        """Whether a round begins with the moments of the last."""
        return not self.spec.share_body or self.job.inner.optimizer_state == "keep"

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's, by group and kind."""
        return {f"{group}.{key}": v for group, kept in self.optimizer.moments.items() for key, v in kept.items()}

    @contextmanager
    def on_device(self) -> Iterator[LanguageModel]:
        """The whole model where it computes: a copy where that is not its home, its matrices as they are multiplied."""
        if self.hardware.home == self.hardware.device:
            yield self.model
            return
        model = new_model(self.job, self.vocabulary_size, "meta")
        for block in model.body.blocks if self.hardware.autocast else ():
            for part in (block.attention, block.mlp):
                part.bfloat16()  # pyright: ignore[reportCallIssue]
        model.to_empty(device=self.hardware.device).load_state_dict(self.model.state_dict())
        yield model

    def begin_moments(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Begin with these moments, and no others: as `moments` told them, on any device."""
        self.optimizer = self._new_optimizer()
        for name, tensor in moments.items():
            group, key = name.split(".")
            self.optimizer.moments.setdefault(group, {})[key] = tensor

    def draw_tokens(self, round: int) -> None:
        """Re-draw the token embedding and forget its moments (ACT)."""
        drawn = drawn_embedding(self.job, self.vocabulary_size, self.spec.silo, round)
        with torch.no_grad():
            self.model.embedding.tokens.copy_(drawn.tokens)
        self.optimizer.moments.pop("tokens", None)

    def parts(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Of a snapshot: all that stays home."""
        parts: dict[str, Mapping[str, torch.Tensor]] = {}
        if not self.spec.share_rows:
            parts["embedding"] = self.model.embedding.state_dict()
        if not self.spec.share_body:
            parts["body"] = {"flat": self.body}
        if self.keeps_moments:
            parts["optimizer"] = self.moments
        return parts

    def load(self, parts: Parts, first_tables: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Take what `parts` said; what they lack is drawn, or begins with nothing.

        Args:
            parts: of a snapshot; empty: of a fresh silo.
            first_tables: makes its first embedding.
        """
        self.begin_moments(parts.get("optimizer", {}))
        if not self.spec.share_rows:
            self.model.embedding.load_state_dict(parts.get("embedding") or first_tables())
        if not self.spec.share_body:
            self.body.copy_(parts["body"]["flat"] if "body" in parts else fresh_body(self.job))

    def _new_optimizer(self) -> Optimizer:
        optimizer = make_optimizer(self.job, self.body, self.layout, self._body_grad, self.model.embedding)
        if self.hardware.shard == "moments":
            divide(optimizer.groups, self._rank, self.hardware.ranks)
        return optimizer


def new_model(job: Job, vocabulary_size: int, device: str) -> LanguageModel:
    """A silo's, of whatever values memory held."""
    with torch.device("meta" if device == "meta" else "cpu"):
        model = LanguageModel(Body(job.model), Embedding(vocabulary_size, job.model, job.positions))
    model.body.recompute = job.inner.checkpoint_activations
    return model.to(device)
