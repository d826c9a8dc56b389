"""`Job`: one run, all that a job file may say, and which part of it decides the run's numbers.

Its sections, with every key explained, are `sections`. It reads no file and explains no mistake: `jobfile` does.
Frozen: a run's configuration is a value, and `Job.fingerprint` says which run a folder belongs to.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from dept_ray.errors import ConfigError, nearest
from dept_ray.method_names import MethodName
from dept_ray.sections import (
    FaultsSection,
    InitSection,
    InnerSection,
    MixtureSection,
    ModelSection,
    Name,
    OuterSection,
    RegionsSection,
    Resources,
    RoundsSection,
    Section,
    TokenizerSection,
    WireSection,
)
from dept_ray.source_sections import Source


class Job(Section):
    """One run: everything that `dept-ray train` needs to know."""

    name: Name
    """Of the run, and of its folder."""
    method: MethodName = "spec-opt"
    """What is decoupled (METHOD.md section 2)."""
    seed: int = 0
    """Every draw of the run derives from it."""
    folder: str = "."
    """Holds data/, runs/ and silos/; relative to where the command is run."""
    sources: tuple[Source, ...]
    model: ModelSection = ModelSection()
    tokenizer: TokenizerSection = TokenizerSection()
    inner: InnerSection = InnerSection()
    outer: OuterSection = OuterSection()
    wire: WireSection = WireSection()
    rounds: RoundsSection = RoundsSection()
    faults: FaultsSection = FaultsSection()
    regions: RegionsSection = RegionsSection()
    mixture: MixtureSection = MixtureSection()
    init: InitSection = InitSection()
    resources: Resources = Resources()

    @field_validator("method", mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> Any:
        return value.lower().replace("_", "-") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "Job":
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources is empty: a job needs at least one [[sources]] table")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'sources: the name "{name}" stands twice; each source needs a name of its own')
        if self.inner.context > self.positions:
            raise ValueError(
                f"inner.context = {self.inner.context} is longer than model.positions = {self.positions}: "
                "lower the context or raise the positions"
            )
        if not self.trained:
            raise ValueError("sources: all are held_out, so that nobody would train: remove it from one of them")
        if self.rounds.choose is not None and self.rounds.choose > len(self.trained):
            raise ValueError(f"rounds.choose = {self.rounds.choose}, but there are only {len(self.trained)} sources")
        for wish in [self.resources, *(source.resources for source in self.sources if source.resources)]:
            self._check_shares(wish.processes)
            self._check_ahead(wish.processes)
            self._check_shard(wish)
        return self

    def _check_shares(self, ranks: int) -> None:
        """Whether a batch falls into equal shares, and each of them into micro-batches."""
        batch, micro = self.inner.batch_size, self.inner.micro_batch
        if batch % ranks:
            raise ValueError(
                f"inner.batch_size = {batch} is not a multiple of resources.ranks = {ranks} (by default one for each "
                "of resources.num_gpus): each rank takes an equal share of every batch; mend either"
            )
        if micro is not None and batch // ranks % micro:
            share = f" / resources.ranks = {ranks}" if ranks > 1 else ""
            raise ValueError(f"inner.batch_size = {batch}{share} is not a multiple of inner.micro_batch = {micro}")

    def _check_ahead(self, ranks: int) -> None:
        """Whether steps can be made ahead of their order."""
        ahead, steps = self.inner.ahead_steps, self.inner.local_steps
        if ahead > steps:
            raise ValueError(
                f"inner.ahead_steps = {ahead} is above inner.local_steps = {steps}: nobody goes further ahead than one "
                "round; lower the first or raise the second"
            )
        if ahead and ranks > 1:
            raise ValueError(
                f"inner.ahead_steps = {ahead} and resources.ranks = {ranks} (by default one for each of "
                "resources.num_gpus): only a silo of one rank goes ahead; set either to what it is by default"
            )

    def _check_shard(self, wish: Resources) -> None:
        """Whether what is to be cut can be."""
        if wish.shard == "all" and wish.processes > 1 and wish.num_gpus and self.inner.micro_batch is None:
            raise ValueError(
                'resources.shard = "all" and no inner.micro_batch: where the model is cut it is not found out by '
                "trying; set it, 1 to begin with"
            )
        if self.inner.optimizer == "muon" and wish.shard in ("moments", "all") and wish.processes > 1:
            raise ValueError(
                f'inner.optimizer = "muon" and resources.shard = "{wish.shard}": Muon steps whole matrices, which no '
                'rank has the moments of; set inner.optimizer = "adamw", or resources.shard = "never"'
            )

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the sources that are trained on."""
        return tuple(source.name for source in self.sources if not source.held_out)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the sources that are only scored."""
        return tuple(source.name for source in self.sources if source.held_out)

    @property
    def positions(self) -> int:
        """L, the position table's length in force."""
        return self.model.positions or self.inner.context

    @property
    def total_steps(self) -> int:
        """T * N_local, the length of the one cosine."""
        return self.rounds.total * self.inner.local_steps

    @property
    def fingerprint(self) -> str:
        """Digest of `identity`: which run a folder belongs to."""
        return _digest(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the numbers of a run; where it is kept, and on what it runs, are left out."""
        values = self.model_dump(mode="json", exclude=_HOUSEKEEPING)
        for section, key in _YOUNGER:
            if values[section][key] == type(getattr(self, section)).model_fields[key].default:
                del values[section][key]
        return values

    def source(self, name: str) -> Source:
        """The source of that name.

        Raises:
            ConfigError: there is none; the message offers the nearest.
        """
        for source in self.sources:
            if source.name == name:
                return source
        raise ConfigError(f'no source "{name}" in job {self.name}{nearest(name, [s.name for s in self.sources])}')

    def storage_of(self, name: str) -> Path:
        """The folder under which a source's data and snapshots stay; the job's own for a mixture of sources."""
        storage = next((s.storage for s in self.sources if s.name == name), None)
        return Path(storage or self.folder)


_WHERE = ("storage", "resources", "vocab_size", "tokens", "paths", "validation_paths")
_HOUSEKEEPING: Any = {
    "folder": True,
    "resources": True,
    "tokenizer": {"global_vocab_size"},
    "rounds": {"keep", "score_every"},
    "inner": {"norms_every"},
    "faults": True,
    "regions": True,
    "init": {"run", "checkpoint"},  # what was taken from there is told by its fingerprint
    # Where files lie may change; what is in them may not: the fingerprint of the tokens is checked on its own.
    "sources": {"__all__": {**dict.fromkeys(_WHERE, True), "of": {"__all__": set(_WHERE)}}},
}
"""What may differ between two starts of one run."""
_YOUNGER = (("model", "kv_heads"), ("model", "norm_eps"), ("model", "rope_theta"), ("outer", "row_weights"))
"""Keys that there are runs without: by default they say what those did, and are no part of an identity."""


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
