"""`[[sources]]`: where a source's text comes from, by kind, and what all kinds have in common."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dept_ray.sections import Fraction, Name, Positive, Resources, Section


class SourceFields(Section):
    """What all kinds of source have in common."""

    name: Name
    """Also the silo's name."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the source's say: on w_k in the mean over silos, and on p_k in the mixture."""
    validation_share: Fraction = 0.05
    """Share of documents held out, chosen by a hash of the document; ignored where validation files are named."""
    max_bytes: Positive | None = None
    """Cap on training text in UTF-8 bytes; reading stops there."""
    max_validation_bytes: Positive | None = None
    """Cap on validation text in UTF-8 bytes. All of it is scored each time."""
    storage: str | None = None
    """Where this source's text, shards and snapshots stay (a folder of its own region); None: the job's folder."""
    resources: Resources | None = None
    """Overrides `[resources]` for this silo."""
    vocab_size: Positive | None = None
    """|V_k| for `dept-ray plan` without data; prepared data always gives the true one."""
    tokens: Positive | None = None
    """Training tokens for `dept-ray plan` without data."""
    held_out: bool = False
    """Only scored, on its validation text: it trains neither the model nor a global tokenizer (a mixture only)."""
    joined: bool = False
    """Joined a run in progress (`dept-ray add` sets it): a global tokenizer was made without its text."""


class HubSource(SourceFields):
    """A Hugging Face dataset, streamed, or a local folder written by `datasets`' `save_to_disk`."""

    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    split: str = "train"
    validation_split: str | None = None
    """A split to validate on; None: hold out `validation_share`."""
    column: str = "text"


class FilesSource(SourceFields):
    """Globs of parquet, jsonl or txt, each also .gz or .zst; local, s3:// or gs://. One txt file is one document."""

    kind: Literal["files"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    validation_paths: tuple[str, ...] = ()
    """Files to validate on; empty: hold out `validation_share`."""
    column: str = "text"
    """Of parquet and jsonl."""

    @field_validator("paths", "validation_paths", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class InstalledSource(SourceFields):
    """Real text that every machine with this package has: no download, nothing committed."""

    kind: Literal["installed"]
    collection: Literal["docs", "python", "cpp", "maths"]
    """docs: English docstrings and package descriptions. python: source code. cpp: torch's headers.
    maths: worked problems generated from a seed."""


ReadSource = Annotated[HubSource | FilesSource | InstalledSource, Field(discriminator="kind")]
"""What text is read from."""


class DealtSource(SourceFields):
    """One share of the text of several sources, dealt by a hash of each document: the same text, told apart by chance.

    Each side is dealt by itself; caps and validation are those of the sources.
    """

    kind: Literal["dealt"]
    of: Annotated[tuple[ReadSource, ...], Field(min_length=1)]
    share: Annotated[int, Field(ge=0)]
    """Its number, from 0."""
    shares: Positive
    """How many there are."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "DealtSource":
        if self.share >= self.shares:
            raise ValueError(
                f"sources.{self.name}.share = {self.share}: of sources.{self.name}.shares = {self.shares} the last is "
                f"{self.shares - 1}"
            )
        if self.max_bytes or self.max_validation_bytes:
            raise ValueError(f"sources.{self.name}: what is dealt has no caps of its own; cap the sources in `of`")
        return self


Source = Annotated[HubSource | FilesSource | InstalledSource | DealtSource, Field(discriminator="kind")]
