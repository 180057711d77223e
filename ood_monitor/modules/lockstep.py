"""Processes that keep step through the forward passes of a model that they hold in shards.

A pass gathers the weights of one part after the other, which takes all processes: one that runs a
pass alone waits for the others. So each gathering is told first. A process that has no use for it,
since its batches have ended, its batch took fewer passes, or it failed on its way, takes part all
the same, and throws the weights away.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ood_monitor.modules.shards import fully_sharded, initialise
from ood_monitor.modules.weights import device_of

__all__ = ["Lockstep"]

#: Told in place of a part's number: no gathering until all are done, or ever again.
_DONE, _ENDED = -1, -2


class Lockstep:
    """The gatherings of one model; of one that is not sharded nothing is done or told.

    A wait lasts as long as the `timeout` of the processes' group, or as `numbers` waits.

    Args:
        module: The model.
        numbers: Gives one number of every process for that of this one, which they agree by; by
            default a collective of the processes that have the shards.

    Raises:
        ValueError: Its parts are sharded among different processes, or one in several ways.
    """

    def __init__(
        self, module: nn.Module, numbers: Callable[[int], list[int]] | None = None
    ) -> None:
        self._module, self._device = module, device_of(module)
        self._tell = numbers or self._numbers
        self._parts = [part for part in fully_sharded(module) if _groups(part)]
        self._processes = _processes(self._parts)
        self._depths = _depths(self._parts)
        self._is_following = False
        if self._processes is None or self._processes.size() == 1:
            self._parts = []

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Passes of this process, any number of them; all come out of the block together.

        All must enter it as often, or have come to :meth:`end`. Within a block another is part of
        it.
        """
        if not self._parts or isinstance(_group(self._parts[0])._all_gather_comm, _Told):
            yield
            return
        initialise(self._module)
        with ExitStack() as stack:
            for index, part in enumerate(self._parts):
                stack.enter_context(self._told(index, part))
            try:
                yield
            except Exception:  # the others must not wait for it
                self._follow(_DONE)
                raise
            self._follow(_DONE)

    def end(self) -> None:
        """There are no further passes of this process; wait until that holds for all."""
        self._follow(_ENDED)

    @contextmanager
    def _told(self, index: int, part: Any) -> Iterator[None]:
        """Tell each gathering of a part, and make none ahead of time."""
        state, group = part._get_fsdp_state(), _group(part)
        usual, ahead = group._all_gather_comm, state._states_to_forward_prefetch
        part.set_custom_all_gather(_Told(self, index, usual))
        state._states_to_forward_prefetch = []
        try:
            yield
        finally:
            state._states_to_forward_prefetch = ahead
            part.set_custom_all_gather(usual)

    def reach(self, index: int) -> None:
        """Wait until it is this part's turn, and take part in others' until then."""
        if self._is_following:
            return
        while (chosen := self._chosen(self._tell(index))) != index:
            self._gather(chosen)

    def _follow(self, status: int) -> None:
        """Take part in what others gather until none does; to the end of all, if it is that."""
        while self._parts:
            told = self._tell(status)
            if max(told) >= 0:
                self._gather(self._chosen(told))
            elif status == _DONE or set(told) == {_ENDED}:
                return

    def _numbers(self, own: int) -> list[int]:
        """What each process says, by rank."""
        assert self._processes is not None
        told = torch.tensor([own], device=self._device)
        parts = [torch.empty_like(told) for _ in range(self._processes.size())]
        dist.all_gather(parts, told, group=self._processes)
        return [int(part) for part in parts]

    def _chosen(self, told: list[int]) -> int:
        """The innermost: whoever runs a part that others have yet to reach is further inside."""
        return max((i for i in told if i >= 0), key=lambda i: (self._depths[i], -i))

    def _gather(self, index: int) -> None:
        """Gather a part that another process needs; here it is as before afterwards."""
        part = self._parts[index]
        was_whole, self._is_following = _group(part).is_unsharded, True
        try:
            part.reshard()  # what is whole is not gathered
            part.unshard()
            if not was_whole:
                part.reshard()
        finally:
            self._is_following = False


class _Told:
    """How a part gathers its weights: in its usual way, once its turn has come."""

    def __init__(self, lockstep: Lockstep, index: int, usual: Any) -> None:
        self._lockstep, self._index, self._usual = lockstep, index, usual

    def allocate(self, *args: Any, **kwargs: Any) -> Any:
        return self._usual.allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._lockstep.reach(self._index)
        return self._usual(*args, **kwargs)


def _groups(part: Any) -> list[Any]:
    """What a part gathers; nothing of whole copies, or if all is in parts of their own."""
    groups = part._get_fsdp_state()._fsdp_param_groups
    return [group for group in groups if hasattr(group.mesh_info, "shard_process_group")]


def _group(part: Any) -> Any:
    return _groups(part)[0]


def _processes(parts: list[Any]) -> Any:
    """The group of processes that have the shards; None without parts."""
    found = [group.mesh_info.shard_process_group for part in parts for group in _groups(part)]
    ranks = {tuple(dist.get_process_group_ranks(group)) for group in found}
    if len(found) > len(parts) or len(ranks) > 1:
        raise ValueError(
            "Expected `fully_shard` with one mesh for all parameters, got parts that are sharded "
            f"among processes {sorted(ranks)}: score the consolidated checkpoint."
        )
    return next(iter(found), None)


def _depths(parts: list[Any]) -> list[int]:
    """How many of the parts each is in, itself included."""
    counts = {id(part): 0 for part in parts}
    for part in parts:
        for inner in part.modules():
            if id(inner) in counts:
                counts[id(inner)] += 1
    return list(counts.values())
