"""`Learner`: what training changes in a silo: the model, its flat body, and the optimizer's moments.

It is drawn, put into a snapshot's parts and read from them. What is ordered, read, sent and saved is `silo`'s to know.
"""

from collections.abc import Callable, Mapping

import torch

from dept_ray.config import Job
from dept_ray.messages import SiloSpec
from dept_ray.silo.fresh import drawn_embedding, fresh_body
from dept_ray.silo.hardware import Hardware
from dept_ray.silo.inner import make_optimizer
from dept_ray.silo.model import Body, Embedding, LanguageModel, flatten_parameters, layout_of
from dept_ray.silo.optimizer import Optimizer
from dept_ray.silo.parts import divide
from dept_ray.silo.snapshot import Parts
from dept_ray.silo.vectors import Vectors


class Learner:
    """Of one silo.

    Args:
        job, spec: what the silo was made of.
        hardware: where the model is, and in how many parts moments are kept.
        vocabulary_size: rows of its embedding.
    """

    def __init__(self, job: Job, spec: SiloSpec, hardware: Hardware, vocabulary_size: int) -> None:
        self.job, self.spec, self.hardware, self.vocabulary_size = job, spec, hardware, vocabulary_size
        self.layout = layout_of(job.model)  # pyright: ignore[reportArgumentType] - a frozen section has a hash
        body = Body(job.model)
        body.recompute = job.inner.checkpoint_activations
        self.model = LanguageModel(body, Embedding(vocabulary_size, job.model, job.positions)).to(hardware.device)
        self.body, self._body_grad = flatten_parameters(self.model.body, self.layout)
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

    def begin_moments(self, moments: Mapping[str, torch.Tensor], rank: int = 0) -> None:
        """Begin with these moments, and no others.

        Args:
            moments: as `moments` told them, on any device.
            rank: of the silo, whose part is stepped here.
        """
        self.optimizer = self._new_optimizer(rank)
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

    def _new_optimizer(self, rank: int = 0) -> Optimizer:
        optimizer = make_optimizer(self.job, self.body, self.layout, self._body_grad, self.model.embedding)
        divide(optimizer.groups, rank, self.hardware.parts)
        return optimizer
