"""How do several processes train what one would? Each rank has a part of every batch, and the network or part of it.

Processes find each other as torchrun has them do, through its environment variables, and talk through torch.distributed
as transformers and accelerate set it up. What is ours is which row goes to whom: the rows of every optimizer step are
those of one rank, in its order, whatever the number of ranks, and so are the losses.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightweight import preload  # isort: skip  # noqa: F401  # before Trainer, which imports peft

import torch
from accelerate import DistributedType, PartialState
from accelerate.data_loader import SeedableRandomSampler
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import TrainingArguments

from lightweight.internals import accelerate as accelerate_internals
from lightweight.internals import torch as torch_internals

if TYPE_CHECKING:
    from transformers import Trainer

T = TypeVar("T")

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which transformers and accelerate tell that they were launched."""

STORE = "LIGHTWEIGHT_STORE"
"""Environment variable: the file in which the ranks that the suite starts find each other."""


class RanksError(ValueError):
    """A trial that several ranks cannot share. The message names what prevents it and the mend."""


SHARDED: Mapping[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
}
"""TrainingArguments of a sharded trial: every layer's weights are gathered for its forward and its backward pass, and
what is saved is whole."""

REPLICATED: Mapping[str, Any] = {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
"""TrainingArguments of a replicated trial, which DistributedDataParallel trains. A trained weight that a pass does not
reach is an error of its own then; looked for, it would be found in the last pass alone, and lose what others gave."""


def rank() -> int:
    """This process's number among the ranks; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the rank that speaks and writes for all."""
    return rank() == 0


def world_size() -> int:
    """How many ranks there are, by the environment: as torchrun or accelerate launched them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among the ranks of its host, and so that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def environment(rank: int, world_size: int, store: Path | None) -> dict[str, str]:
    """What torchrun would put into the environment of `rank` on one host, whose ranks find each other in `store`;
    nothing for one rank without a store.

    https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    """
    if store is None:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        STORE: str(store),
    }


def make_store(folder: Path) -> Path:
    """Where the ranks of one trial find each other: a file in a new folder inside `folder` that nobody else can open.
    torch's TCPStore would ask nobody who connects for a secret."""
    return Path(tempfile.mkdtemp(prefix="ranks-", dir=folder)) / "store"


def meet(*, cpu: bool) -> None:
    """Have all ranks able to talk, and wait for them, unless they have met. One by itself has nobody to talk to: it
    forgets its launcher, and so trains as a process that had none."""
    if world_size() == 1:
        for name in LAUNCHED:
            os.environ.pop(name, None)
    elif not distributed.is_initialized():
        share_threads()
        if cpu:
            accelerate_internals.leave_cpu_unnumbered()
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            _listen_on_loopback()
        ours: dict[str, Any] = {}  # torchrun has a store of its own
        if STORE in os.environ:
            ours = {"init_method": f"file://{os.environ[STORE]}", "rank": rank(), "world_size": world_size()}
            ours["timeout"] = timedelta(seconds=TrainingArguments.ddp_timeout)  # as transformers would have it
        PartialState(cpu=cpu, **ours)


def _listen_on_loopback() -> None:
    """Have the ranks reached from this host alone, where else gloo and NCCL take the interface of the host's name, or
    any. Neither asks who connects for a secret."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = "lo0" if "lo0" in names else "lo"  # as macOS calls it, and Linux
    os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback)


def share_threads() -> None:
    """Have this rank compute with its share of the threads that one process would take, unless OMP_NUM_THREADS says how
    many. Ranks that took all cores each would wait for one another; accelerate shares them too, with a warning."""
    if world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def wait_for_all() -> None:
    """Return when every rank has got here."""
    if distributed.is_initialized():
        distributed.barrier()


def of_first(act: Callable[[], T]) -> T:
    """What `act` returns, or raises, on the first rank, on every rank; the others do not call it."""
    if not distributed.is_initialized():
        return act()
    result_and_error: list[Any] = [None, None]
    if is_first():
        try:
            result_and_error[0] = act()
        except Exception as error:  # noqa: BLE001  every rank raises it
            result_and_error[1] = error
    distributed.broadcast_object_list(result_and_error)
    result, raised = result_and_error
    if raised is not None:
        raise raised
    return result  # type: ignore[no-any-return]


def any_says(*said: bool, device: torch.device) -> list[bool]:
    """For each of `said` whether any rank says so; all ranks must ask. Waits for the device where there are several."""
    if world_size() == 1:
        return list(said)
    flags = torch.tensor(said, dtype=torch.int32, device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def is_first_to_say() -> bool:
    """Whether no other rank has asked this before: of several that fail in one way, one tells."""
    if world_size() == 1:
        return True
    # What the launcher's environment names is there for as long as the launcher is, and kept where that starts again.
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    return bool(store.add(f"lightweight/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1)


def is_of_a_lost_one(error: BaseException) -> bool:
    """Whether `error` says that another rank no longer answers: gloo tells that as any other failure."""
    lost = re.search(r"gloo.*(closed by peer|reset by peer|Broken pipe|Timed out|timeout)", str(error), re.IGNORECASE)
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and lost is not None)


def draws(trainer: Trainer, rows: Sequence[Any]) -> SeedableRandomSampler:
    """The order in which the Trainer draws `rows` on one rank, epoch by epoch."""
    return SeedableRandomSampler(rows, data_seed=trainer.args.data_seed)


def drawn(rows: Sequence[Any], seed: int) -> SeedableRandomSampler:
    """The same where nothing but the seed of a trial says so."""
    return SeedableRandomSampler(rows, data_seed=seed)


class Deal(Sampler[int]):
    """Numbers of rows in the order in which accelerate deals batches of `batch` to ranks in turn, so that the ranks'
    passes together are the optimizer steps of one rank: `step` rows each, drawn by `sampler`.

    Where rows do not go round, a rank gets `nothing`, the number of a row that has no answer, for one.
    """

    def __init__(self, sampler: SeedableRandomSampler, *, step: int, batch: int, world_size: int, nothing: int) -> None:
        self._sampler, self._step, self._batch = sampler, step, batch
        self._world_size, self._nothing = world_size, nothing

    def __iter__(self) -> Iterator[int]:
        numbers = list(self._sampler)
        for start in range(0, len(numbers), self._step):
            yield from self._dealt(numbers[start : start + self._step])

    def __len__(self) -> int:
        whole, rest = divmod(len(self._sampler), self._step)
        return whole * self._slots(self._step) + self._slots(rest)

    def set_epoch(self, epoch: int) -> None:
        """The order of an epoch follows from the seed and its number."""
        self._sampler.set_epoch(epoch)

    def _slots(self, rows: int) -> int:
        a_pass = self._batch * self._world_size
        return -(-rows // a_pass) * a_pass

    def _dealt(self, numbers: list[int]) -> Iterator[int]:
        """One optimizer step: pass by pass, rank by rank."""
        a_pass = self._batch * self._world_size
        for start in range(0, len(numbers), a_pass):
            of_pass = numbers[start : start + a_pass]
            for rank in range(self._world_size):
                own = of_pass[rank :: self._world_size]
                yield from own + [self._nothing] * (self._batch - len(own))


def gather_as_stored(trainer: Trainer) -> None:
    """Let FSDP2 gather weights in the format they are stored in, and autocast cast them, as on one rank. accelerate
    would have it gather them in half precision, which takes 4-bit weights that are stored as fp32 for numbers."""
    if trainer.accelerator.state.distributed_type == DistributedType.MULTI_CPU:  # which stand in for GPUs here
        accelerate_internals.shard_on_cpu(trainer)
    accelerate_internals.gather_as_stored(trainer)


def add_up_gradients(network: torch.nn.Module) -> None:
    """Let FSDP2, or DistributedDataParallel, add up the ranks' gradients in `network`, where it would average them."""
    if isinstance(network, DistributedDataParallel):
        network.register_comm_hook(
            None, lambda _, bucket: _summed(bucket)
        )  # it evaluates no annotations as they are here
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else NCCL divides by that one


def without_ties(network: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights`, gathered, without those that are others by another name, which FSDP2 gathers twice."""
    tied = getattr(network, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in weights.items() if name not in tied}


def _summed(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """The sum of a bucket of DistributedDataParallel's over the ranks, in its place."""
    buffer = bucket.buffer()
    sent: Any = distributed.all_reduce(buffer, async_op=True)
    return sent.get_future().then(lambda _: buffer)  # type: ignore[no-any-return]


BUCKET_BYTES = 8 * 2**20
"""Of gradients that are sent at one time."""


class Reducer:
    """Adds up gradients over the ranks while a backward pass still makes them, in flat buckets: each is sent as soon as
    all of it is there, and in one order on every rank. Can be recorded in a CUDA graph.

    `weights` are trained, and `gradients` gives those of some of them, once they are made; `also`, tensors that are
    there before the backward pass, go with the first bucket. DistributedDataParallel would want the network's forward
    pass, and gradients of the weights that are computed with, not of their fp32 masters.
    """

    def __init__(
        self,
        weights: Sequence[torch.nn.Parameter],
        gradients: Callable[[Sequence[torch.nn.Parameter]], list[torch.Tensor]],
        also: Sequence[torch.Tensor] = (),
    ) -> None:
        self._gradients, self._also = gradients, also
        self._buckets: list[list[torch.nn.Parameter]] = [[]]
        size = 0
        for weight in reversed(weights):  # the last of the network are the first to get theirs
            if size >= BUCKET_BYTES:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(weight)
            size += 4 * weight.numel()

    @contextmanager
    def adding_up(self) -> Iterator[None]:
        """Inside, one backward pass, the last of a step; afterwards the gradients are the ranks' sums. All ranks must
        enter it."""
        self._waiting = deque(self._buckets)
        self._made: set[torch.nn.Parameter] = set()
        self._sent: list[tuple[list[torch.Tensor], torch.Tensor, Any]] = []
        hooks = [
            weight.register_post_accumulate_grad_hook(self._on_made) for bucket in self._buckets for weight in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        while self._waiting:  # no pass has reached some of these
            self._send(self._waiting.popleft())
        for tensors, flat, work in self._sent:
            work.wait()
            _copy_out(flat, tensors)
        self._sent.clear()

    def _on_made(self, weight: torch.Tensor) -> None:
        if weight in self._made:
            raise RuntimeError("a gradient grew after it was sent: give gradient_checkpointing use_reentrant=False")
        self._made.add(weight)  # type: ignore[arg-type]
        while self._waiting and self._made.issuperset(self._waiting[0]):
            self._send(self._waiting.popleft())

    def _send(self, bucket: Sequence[torch.nn.Parameter]) -> None:
        tensors = [*(() if self._sent else self._also), *self._gradients(bucket)]
        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._sent.append((tensors, flat, distributed.all_reduce(flat, async_op=True)))


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each of `tensors` by its sum over the ranks, in one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    _copy_out(flat, tensors)


def _copy_out(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy what `flat` has of `tensors`, one after the other, into them."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch_internals.copy_each_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
