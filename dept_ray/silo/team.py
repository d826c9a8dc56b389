"""`Team`: the ranks that train one silo together, as each of them sees it.

Every rank has all parameters and takes its own rows of every batch. Then either each makes the same optimizer step on
the same summed gradient, and no parameter travels during a round; or, where that is too much for a GPU, each steps a
part of its own and all copy each other's parts (`parts`). Either way all are equal to the bit after every step
(`check_equal` proves it at a round's end), and as many bytes travel: a sum is a sum of parts and a copy of parts. Or
no rank has all parameters (`sharded`), and torch moves them itself.

Gradients are summed once a step, after the last micro-batch, and not while the backward pass runs. For N parameters, a
step of 256 x 2048 tokens is 6 N x 524,288 operations: 0.98 ns a parameter on eight GPUs at 400 TFLOP/s each. A ring
moves 2 x 7/8 x 4 = 7 bytes a parameter: 0.023 ns at 300 GB/s (NVLink), 2 % of the step, which is all that overlapping
could save. Over PCIe at 25 GB/s it is 0.28 ns, 29 %: raise `inner.batch_size` there, or use fewer ranks.

Small things (may all stop?) go over gloo on the CPU, so that they never wait for a GPU. A silo lives on one node: its
ranks meet on the loopback interface.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from dept_ray.errors import SiloError

_HERE = "127.0.0.1"
_LOOPBACK = "loopback"
"""Gloo that listens on this machine alone, by the name that torch has for it."""
_LOOK_EVERY = timedelta(seconds=1)


class Team:
    """One rank's view of all; by default the only one.

    Args:
        rank: its number; 0 obeys orders, the others follow it.
        size: how many they are.
        small: process group of CPU tensors.
        large: process group of the tensors that are trained.
        store, wait: where they met, and what any of them waits for any other.
        gone: whether another one is known to have ended.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, small: Any = None, large: Any = None, store: Any = None, wait: Any = None,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.rank, self.size, self._small, self._large = rank, size, small, large
        self._store, self._wait, self._gone = store, wait, gone
        self._mesh: Any = None

    def rows(self, batch: np.ndarray) -> np.ndarray:
        """This rank's rows of a batch (B, ...): the block (B / size, ...) of its number."""
        each = len(batch) // self.size
        return batch[self.rank * each : (self.rank + 1) * each]

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank; all must ask alike."""
        if self.size == 1:
            return here
        said = torch.tensor([int(here)])
        self._done(self._small.allreduce, [said])
        return bool(said.item())

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, the same bits on all of them."""
        if self.size > 1:
            for tensor in tensors:
                self._done(self._large.allreduce, [tensor])

    def sum_to(self, rank: int, tensor: torch.Tensor) -> None:
        """Replace a vector by its sum over the ranks on one of them; elsewhere its values mean nothing afterwards."""
        if self.size > 1 and len(tensor):
            self._done(self._large.reduce, tensor, rank)

    def copy_from(self, rank: int, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by that of one rank."""
        if self.size > 1:
            for tensor in tensors:
                if tensor.numel():
                    # A scalar too: as a vector of one.
                    self._done(self._large.broadcast, tensor.detach().view(-1), rank)

    def check_equal(self, tensors: Iterable[torch.Tensor]) -> None:
        """Hold the ranks to having the same bits.

        Raises:
            SiloError: they have not.
        """
        if self.size == 1:
            return
        bits = sum(int(tensor.detach().view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors)
        ends = torch.tensor([bits, -bits])
        self._done(self._small.allreduce, [ends], _distributed().ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise SiloError(f"the {self.size} ranks of a silo do not have the same parameters any more")

    def mesh(self, device_type: str) -> Any:
        """All ranks as a mesh of one dimension, for what torch does with those (`sharded`).

        They become torch's default process group, of which a process has one, until this rank leaves. (Its name is the
        same each time: torch keeps some meshes for ever, and finds a later team's group by it.)

        Raises:
            SiloError: this process has one.
        """
        if self._mesh is not None:
            return self._mesh
        dist = _distributed()
        if dist.is_initialized():
            raise SiloError(
                'resources.shard = "all", and torch lets a process have one silo whose model is cut, of which this is '
                "the second: train on Ray, where each silo has a process of its own"
            )
        if _LOOPBACK not in dist.Backend.backend_list:
            dist.Backend.register_backend(_LOOPBACK, _gloo_here, devices=["cpu"])
        backend = _LOOPBACK if device_type == "cpu" else f"cpu:{_LOOPBACK},cuda:nccl"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("mesh", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=self._wait,
        )
        if device_type == "cuda":  # NCCL's communicators can only be given up together
            self._large = dist.distributed_c10d._get_default_group()._get_backend(torch.device(device_type))
        self._mesh = dist.device_mesh.init_device_mesh(device_type, (self.size,))
        return self._mesh

    def leave(self) -> None:
        """Wait for nobody any more: what another rank's end left unfinished on a GPU would block it for ever."""
        try:
            if self._mesh is not None:
                _distributed().distributed_c10d._abort_process_group()
        finally:
            self._mesh = None
            if self.size > 1:
                self._large.abort()

    def _done(self, collective: Callable[..., Any], *args: Any) -> None:
        """Raises SiloError where another rank is gone, or silent for longer than the group waits."""
        try:
            work = collective(*args)
            if self._large is self._small:
                self._look_while_waiting(work)
            else:
                work.wait()
        except RuntimeError as err:
            raise self._lost(err) from None

    def _look_while_waiting(self, work: Any) -> None:
        """Wait, and see for oneself who ends meanwhile.

        Gloo fails what waits for a connection that breaks, but for what has read the first part of a message: that
        waits for the rest until its time is up (`Pair::signalException` in gloo/transport/tcp/pair.cc, in 2026). Where
        tensors are on GPUs, what it carries is too small to come in parts.
        """
        while not work.is_completed():
            try:
                work.wait(_LOOK_EVERY)
            except RuntimeError:
                if not work.is_completed() and self._gone():
                    # A group's end waits for all that it began: let somebody else do that.
                    threading.Thread(target=_outlast, args=(work, self._small), daemon=True).start()
                    raise RuntimeError("its process has ended") from None
        work.wait()  # says what it failed for

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While torch itself lets ranks talk: what it raises where another is gone is a SiloError here too."""
        try:
            yield
        except RuntimeError as err:
            if self.size > 1 and (isinstance(err, _distributed().DistError) or "/gloo/" in str(err)):
                raise self._lost(err) from None
            raise

    def _lost(self, err: Exception) -> SiloError:
        return SiloError(f"rank {self.rank} of {self.size} lost another: {_first_words(err)}")


ALONE = Team()
"""Of a silo with one rank."""


def new_store(timeout_s: float) -> Any:
    """Where ranks meet: a table of names and values on this machine's loopback interface, at a free port."""
    listener = socket.socket()
    listener.bind((_HERE, 0))
    listener.listen()
    port, wait = listener.getsockname()[1], timedelta(seconds=timeout_s)
    return _distributed().TCPStore(
        _HERE, port, is_master=True, wait_for_workers=False, timeout=wait, master_listen_fd=listener.detach()
    )


def open_store(port: int, timeout_s: float) -> Any:
    """The table of another process."""
    return _distributed().TCPStore(_HERE, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def _outlast(work: Any, group: Any) -> None:
    """Hold a group until what it began has ended, however."""
    with suppress(RuntimeError):
        work.wait()


def join(
    store: Any, rank: int, size: int, gpu: bool, timeout_s: float, gone: Callable[[], bool] = lambda: False
) -> Team:
    """Become a rank; returns when all have.

    Args:
        store: where they meet.
        rank, size: its number, and how many they are.
        gpu: whether it trains on one.
        timeout_s: what any of them waits for any other, now and later.
        gone: whether another one is known to have ended, to whom knows.

    Raises:
        SiloError: another is gone, or does not come.
    """
    dist, wait = _distributed(), timedelta(seconds=timeout_s)
    try:
        small = large = _gloo_here(dist.PrefixStore("gloo", store), rank, size, wait)
        if gpu:
            settings = dist.ProcessGroupNCCL.Options()
            settings._timeout = wait
            large = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, settings)
    except RuntimeError as err:
        raise SiloError(f"rank {rank} of {size} did not meet the others: {_first_words(err)}") from None
    return Team(rank, size, small, large, store, wait, gone)


def _gloo_here(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group on the loopback interface."""
    gloo = _distributed().ProcessGroupGloo
    options = gloo._Options()
    options._devices, options._timeout = [gloo.create_device(hostname=_HERE)], timeout
    return gloo(store, rank, size, options)


def _first_words(err: Exception) -> str:
    """Without where in torch's sources it was raised, and what that may mean.

    >>> _first_words(RuntimeError("[a/b.cc:553] Connection closed by peer [127.0.0.1]:3042. This is\\nrare"))
    'Connection closed by peer [127.0.0.1]:3042'
    """
    line = str(err).splitlines()[0]
    return (line.split("] ", 1)[-1] if line.startswith("[") else line).split(". ")[0]


def _distributed() -> Any:
    """torch.distributed, whose checkers know only half of it; a second to import, for those alone who have ranks."""
    from torch import distributed

    return distributed
