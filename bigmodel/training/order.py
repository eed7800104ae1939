"""Which rows each step of each rank takes: fixed by the seed alone, so that whoever goes on knows it too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Batch = Sequence[int]


@dataclass(frozen=True, slots=True)
class Order:
    """As torch's `DistributedSampler` and a `DataLoader` over it: every epoch is shuffled anew by seed + epoch, rank r
    takes each ranks-th row from the r-th on, and the first ones again where rows do not share out evenly."""

    rows: int
    ranks: int
    batch_size: int
    accumulation: int
    seed: int

    def steps(self, begin: int, end: int) -> Iterator[list[list[Batch]]]:
        """Yield for each step from `begin` to `end` the batches of every rank: [rank][batch] → rows."""
        each = self._steps_of_an_epoch()
        for epoch in range(begin // each, -(-end // each)):
            shares = [self._batches(rank, epoch) for rank in range(self.ranks)]
            for step in range(max(begin - epoch * each, 0), min(end - epoch * each, each)):
                first = step * self.accumulation
                yield [share[first : first + self.accumulation] for share in shares]

    def _steps_of_an_epoch(self) -> int:
        return -(-len(self._batches(0, 0)) // self.accumulation)

    def _batches(self, rank: int, epoch: int) -> list[Batch]:
        from torch.utils.data import DistributedSampler

        sampler = DistributedSampler(range(self.rows), self.ranks, rank, shuffle=True, seed=self.seed)  # type: ignore[arg-type, var-annotated]
        sampler.set_epoch(epoch)
        rows = list(sampler)
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
