"""What a silo reads: its sources' tokens, the rows that they need, and their batches, drawn as the job says."""

from collections.abc import Mapping

from dept_ray.config import Job
from dept_ray.errors import SiloError
from dept_ray.messages import SiloSpec
from dept_ray.text.prepare import corpus_folder, tokenizer_kind
from dept_ray.text.shards import Corpus, open_corpus
from dept_ray.text.stream import MixedStream, Read, Stream
from dept_ray.text.tokenizer import Vocabulary


def open_corpora(job: Job, spec: SiloSpec) -> dict[str, Corpus]:
    """The prepared tokens of a silo's sources, those that it trains on first.

    Raises:
        ShardError: a source is not prepared, or its shards were altered.
    """
    kind = tokenizer_kind(spec.vocabulary)
    return {name: open_corpus(corpus_folder(job, name, kind)) for name in (*spec.sources, *spec.held_out)}


def vocabulary_of(spec: SiloSpec, corpora: dict[str, Corpus]) -> Vocabulary:
    """The rows of a silo: what its source uses, or everything."""
    return next(iter(corpora.values())).rows_of(spec.vocabulary)


def open_stream(job: Job, spec: SiloSpec, corpora: Mapping[str, Corpus], read: Read | None) -> MixedStream:
    """The batches of the sources that a silo trains on.

    Args:
        job, spec: what the silo was made of.
        corpora: of its sources.
        read: how blocks become tokens, ahead of time; None: from their shards, in this process.

    Raises:
        SiloError: a source is smaller than a batch.
    """
    inner, trained = job.inner, {name: corpora[name].train for name in spec.sources}
    blocks = {name: int(train.starts(inner.context)[-1]) for name, train in trained.items()}
    for name, count in blocks.items():
        if count == 0:
            raise SiloError(
                f'source "{name}" has no whole block of the context: inner.context = {inner.context:,}, and its '
                f"training text is {trained[name].tokens:,} tokens; lower inner.context, or give it more text"
            )
        if count < inner.batch_size:
            raise SiloError(
                f'source "{name}" has {count} blocks of {inner.context} tokens, fewer than one batch '
                f"(inner.batch_size = {inner.batch_size}): lower inner.batch_size or inner.context, "
                "or give it more text"
            )
    streams = {name: Stream(name, count, job.seed) for name, count in blocks.items()}
    here: Read = lambda name, blocks: trained[name].read(blocks, inner.context)  # noqa: E731
    weights = {n: job.source(n).weight * train.tokens**job.mixture.temperature for n, train in trained.items()}
    return MixedStream(streams, weights, inner.batch_size, inner.context, job.seed, read or here, here)
