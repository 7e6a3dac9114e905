"""The processes that train together, as ``accelerate launch`` (or torchrun) started them; one of them without it.

Gradients are averaged by torch's DistributedDataParallel; what is here is who takes which samples, and the few numbers
and files on which all have to agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wadi_core.pipeline import find_device

T = TypeVar("T")


class Processes:
    """This process among those that train together.

    Args:
        device: by its name; empty takes this process's GPU if there is one, else the CPU.

    Attributes:
        rank, count: this process, and how many there are.
        device: where this process computes.

    Raises:
        ValueError: no such device; one line.
    """

    def __init__(self, device: str = "") -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        self.device: torch.device = find_device(device or None)
        if self.count == 1:
            return
        from accelerate import PartialState

        on_cpu = self.device.type != "cuda"
        state = PartialState(cpu=on_cpu)
        self.rank, self.count = state.process_index, state.num_processes
        self.device = torch.device("cpu") if on_cpu or state.device is None else state.device
        # What is agreed on between network calls does not go through a GPU, which would have to finish its work first.
        self._talk = torch.distributed.new_group(backend="gloo")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def share(self, numbers: range, size: int) -> list[range]:
        """This process's part of a batch, in network calls.

        Args:
            numbers: of the batch's samples.
            size: samples of one call; 0 takes all of a process's part at once.

        Raises:
            ValueError: the batch does not divide; one line.
        """
        whole = len(numbers)
        size = size or max(1, whole // self.count)
        if whole % (size * self.count):
            raise ValueError(
                f"batch: {whole} samples cannot be shared out among {self.count} processes in calls of {size} (micro_batch); "
                f"a multiple of {size * self.count} can"
            )
        starts = range(self.rank * size, whole, size * self.count)
        return [numbers[start : start + size] for start in starts]

    def wrap(self, part: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes; itself where there is one."""
        if self.count == 1:
            return part
        devices = None if self.device.type == "cpu" else [self.device]
        return nn.parallel.DistributedDataParallel(part, device_ids=devices, gradient_as_bucket_view=True)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over the processes of scalars that each of them has under the same names."""
        together = torch.stack([value.detach().cpu().double() for value in values.values()])
        if self.count > 1:
            together = together.to(self.device)
            torch.distributed.all_reduce(together)
            together /= self.count
        return dict(zip(values, together.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in one of the processes."""
        if self.count == 1:
            return flag
        votes = torch.tensor([float(flag)])
        torch.distributed.all_reduce(votes, group=self._talk)
        return votes.item() > 0

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order, in every process."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self._talk)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns here; if it fails in one of the processes, it fails in all of them.

        Raises:
            OSError, ValueError: as ``work``; a ValueError for what it raised in another process. One line.
        """
        if self.count == 1:
            return work()
        try:
            result = work()
        except (OSError, ValueError) as error:
            self.gather(str(error))
            raise
        for rank, error in enumerate(self.gather("")):
            if error:
                raise ValueError(f"process {rank}: {error}")
        return result

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Part from the others."""
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
