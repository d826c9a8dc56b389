"""Whose text is this? Where each source has an embedding of its own, a text must be given to one of them.

The source whose unigram model gives the text the lowest cross-entropy is taken (METHOD.md section 4). Tokenizers
differ, so it is counted per UTF-8 byte. Needs the prepared tokens of the sources, and no model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dept_ray.config import Job
from dept_ray.rounds.changes import changed
from dept_ray.rounds.methods import method_of, silos_of
from dept_ray.study.generate import last_state
from dept_ray.study.home import at_home, check_at_home
from dept_ray.text.prepare import corpus_folder, tokenizer_kind
from dept_ray.text.shards import open_corpus


@dataclass(frozen=True)
class Choice:
    """A source for a text, and what spoke for it."""

    source: str
    bits: dict[str, float]
    """Bits per byte of the text under each source's unigram model, the least first."""
    cannot: tuple[str, ...] = ()
    """Sources that have no row for one of its tokens: they are taken only where nobody has."""

    @property
    def why(self) -> str:
        """In words."""
        if not self.bits:
            return f"source {self.source}: the first, for there is no text to choose by"
        return f"source {self.source}: its unigram model knows the text best ({self.bits[self.source]:.2f} bits/byte)"


def choose_for(job: Job, folder: Path, text: str) -> Choice:
    """As `choose_source`, among the sources of a run after its last committed round, as far as they are at home here.

    Raises:
        StoreError: no round is committed yet.
        ShardError: a source's prepared tokens are not here; of a run with regions, every source's.
    """
    state = last_state(folder)
    job = changed(job, state.changes)
    trained = {name for name, silo in state.silos.items() if silo.rounds}
    among = [source for silo, sources in silos_of(job).items() if silo in trained for source in sources]
    here = [source for source in among if at_home(job, source)]
    if among and not here:
        check_at_home(job, among[0])
    return choose_source(job, text, here)


def choose_source(job: Job, text: str, among: Sequence[str] = ()) -> Choice:
    """The source that a text is most like, of those that were trained on.

    Args:
        job: in force now.
        text: any; the first source's where it is empty.
        among: sources that have a model; none: all.

    Raises:
        ShardError: a source's prepared tokens are not here.
    """
    among = among or job.trained
    if not text:
        return Choice(among[0], {})
    method, num_bytes = method_of(job), len(text.encode())
    bits, cannot = dict[str, float](), list[str]()
    for name in among:
        corpus = open_corpus(corpus_folder(job, name, tokenizer_kind(method.vocabulary)), verify=False)
        ids = np.array(corpus.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        # Of the whole vocabulary, so that what a source never holds costs it something and not everything.
        bits[name] = float(corpus.unigram_nats(corpus.vocabulary)[ids].sum()) / math.log(2) / num_bytes
        if method.vocabulary == "trimmed" and not np.isin(ids, corpus.used).all():
            cannot.append(name)
    ranked = sorted(bits, key=lambda name: (bits[name], name))
    source = next((name for name in ranked if name not in cannot), ranked[0])
    return Choice(source, {name: bits[name] for name in ranked}, tuple(cannot))
