"""The rows of a silo that joins a run, where embeddings stay home: from the silos at whose home it lives itself.

Under SPEC no row ever leaves its silo's storage, so nobody can be asked for one over the network, and nothing here is.
A silo whose `storage` is the newcomer's own has its snapshots and its tokenizer in that same place: there they are
read, and there what is made of them stays. The order names the snapshots, so that whoever begins the silo again reads
the same (`rounds.changes.donors_of`); a silo that lives where no other does begins from rows that are drawn.
"""

from collections.abc import Mapping

import torch

from dept_ray.config import Job
from dept_ray.draws import seed_for
from dept_ray.messages import RoundOrder, SiloSpec
from dept_ray.silo.fresh import fresh_embedding
from dept_ray.silo.snapshot import load_snapshot, silo_folder
from dept_ray.silo.spelling import spelling, table_of, wanted_by
from dept_ray.silo.warmstart import Table, warm_rows
from dept_ray.text.prepare import corpus_folder, tokenizer_kind
from dept_ray.text.shards import Corpus, open_corpus
from dept_ray.text.tokenizer import Vocabulary


def first_tables(
    job: Job, spec: SiloSpec, corpora: Mapping[str, Corpus], vocabulary: Vocabulary, order: RoundOrder
) -> dict[str, torch.Tensor]:
    """What an embedding that stays home begins with: tokens (V_k, D) and, where they are learned, positions (L, D).

    Args:
        job, spec: the silo's.
        corpora: its own, by source.
        vocabulary: its rows.
        order: names the donors, and how their rows become its own; of positions it takes the first donor's.

    Raises:
        StoreError: a donor's snapshot is missing or altered.
        ShardError: a donor's tokenizer is.
    """
    if not order.donors:
        return fresh_embedding(job, vocabulary, spec.silo).state_dict()
    kind = tokenizer_kind(spec.vocabulary)
    given, tables = list[dict[str, torch.Tensor]](), list[Table]()
    for name in sorted(order.donors):
        assert job.storage_of(name) == job.storage_of(spec.silo), f"{name} lives elsewhere"
        given.append(load_snapshot(silo_folder(job, name) / order.donors[name])[0]["embedding"])
        corpus = open_corpus(corpus_folder(job, name, kind), verify=False)
        tables.append(table_of(spelling(corpus.tokenizer, corpus.rows_of(spec.vocabulary)), given[-1]["tokens"]))
    draws = torch.Generator().manual_seed(seed_for(job.seed, "newcomer", spec.silo))
    wanted = wanted_by([corpora[name] for name in spec.sources], vocabulary, job.seed)
    return {**given[0], "tokens": warm_rows(order.donors_way, wanted, tables, draws)}
