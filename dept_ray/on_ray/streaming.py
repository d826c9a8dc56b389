"""Ray Data as the reader of a silo: one bounded dataset per window of blocks, drained, gone.

An open Ray Data iterator takes a core and the interpreter's lock for as long as it lives, so none is ever open while
a silo trains: the stream's background thread drains the next window, whose blocks a position named (Ray Data has no
position). The read tasks run on the silo's own node, where its shards are; text never moves. The tokens are those of
`Shards.read`, which every task calls.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.extensions import ArrowTensorArray

from dept_ray.on_ray.cluster import leaving_nodes
from dept_ray.on_ray.quiet import house_ray_data, leaving_no_task_behind, quiet_ray_data
from dept_ray.text.shards import Corpus, ShardFile, Shards

_BLOCKS_PER_TASK = 2048
"""A task costs some 10 ms; this many blocks of 128 tokens take 2 ms to read, of 2048 tokens 20 ms."""


class TokenBlocks(Datasource):
    """Given blocks of one source's shards, in the given order.

    Args:
        shards: where the tokens are.
        blocks: (n,) block numbers.
        context: T.
    """

    def __init__(self, shards: Shards, blocks: np.ndarray, context: int) -> None:
        super().__init__()
        self.where = (str(shards.folder), tuple(shards.files), shards.dtype.str)
        self.blocks, self.context, self.row_bytes = blocks, context, (context + 1) * shards.dtype.itemsize

    def estimate_inmemory_data_size(self) -> int:
        return len(self.blocks) * self.row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        count = -(-len(self.blocks) // _BLOCKS_PER_TASK)
        return [
            ReadTask(
                partial(_read, *self.where, piece, self.context),
                BlockMetadata(
                    num_rows=len(piece), size_bytes=len(piece) * self.row_bytes, input_files=None, exec_stats=None
                ),
            )
            for piece in np.array_split(self.blocks, count)
        ]


def _read(
    folder: str, files: tuple[ShardFile, ...], dtype: str, blocks: np.ndarray, context: int
) -> Iterable[pa.Table]:
    tokens = Shards(Path(folder), list(files), dtype).read(blocks, context)
    return [pa.table({"tokens": ArrowTensorArray.from_numpy(tokens)})]


class RayReader:
    """Reads a silo's training blocks through Ray Data, on the node of the process that asks."""

    def __init__(self, corpora: Mapping[str, Corpus], context: int) -> None:
        self.corpora, self.context = corpora, context
        self.node = ray.get_runtime_context().get_node_id()
        quiet_ray_data()

    def __call__(self, source: str, blocks: np.ndarray) -> np.ndarray:
        """(n,) block numbers -> (n, T + 1) tokens, in this order."""
        if self.node in leaving_nodes():  # which takes no task any more; what is here can still be read
            return self.corpora[source].train.read(blocks, self.context)
        house_ray_data()
        with leaving_no_task_behind():
            dataset = ray.data.read_datasource(
                TokenBlocks(self.corpora[source].train, blocks, self.context),
                override_num_blocks=-(-len(blocks) // _BLOCKS_PER_TASK),
                label_selector={"ray.io/node-id": self.node},
            )
            batches = dataset.iter_batches(batch_size=None, batch_format="numpy")
            return np.concatenate([np.asarray(batch["tokens"]) for batch in batches])
