"""The loop: step after step, each one losses, gradients of all ranks, and a changed adapter.

    Trainer.run
      for each step left
        _learn               forward and backward over this rank's batches
        _sum                 losses and gradients of all ranks, summed
        AdamW                at a rate that falls linearly to 0
        save_state           every so many steps, and after the last

Tokens count alike, wherever they stand: a step over several batches and ranks is one over all their rows. What ranks
tell each other is the sum of the adapter's gradients, as torch's DistributedDataParallel has it, but without its copies
and buckets: frozen weights have none, and an adapter's are small.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.errors import StageFailed

from .adapting import adapter_tensors, load_tensors, trained
from .examples import Examples
from .order import Batch, Order
from .saved import (
    Progressed,
    optimizer_tensors,
    random_state,
    read_state,
    restore_optimizer,
    restore_random,
    save_state,
)
from .settings import Training

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

ADAPTER, OPTIMIZER, RANDOM = "adapter/", "optimizer/", "random"
"""What names of a saved state begin with."""
MOST_NORM = 1.0
"""Of all gradients together; longer ones are shortened, as transformers' Trainer has it."""
Told = Callable[[int, int, str], None]
"""Called with steps done, all steps, and the loss and speed in words."""


@dataclass(slots=True)
class Trainer:
    """One rank's part in a training."""

    model: Any
    examples: Examples
    training: Training
    folder: Path
    """Where states are saved: of all ranks the same."""
    rank: int = 0
    ranks: int = 1
    progress: Told = lambda done, total, words: None
    _optimizer: Any = None
    _parameters: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    _so_far: Progressed = field(default_factory=Progressed)

    @property
    def device(self) -> torch.device:
        found: torch.device = next(iter(self._parameters.values())).device
        return found

    @property
    def steps(self) -> int:
        return self.training.steps(len(self.examples.all), self.ranks)

    def run(self) -> Progressed:
        """Train to the end, from the last state that was saved. Raise StageFailed for a loss or gradients
        that are no numbers, with the step."""
        import torch

        self._parameters = dict(trained(self.model))
        rate = self.training.learning_rate
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=rate, weight_decay=0.0)
        self._go_on()
        self.model.train()
        for rows in self._order().steps(self._so_far.step, self.steps):
            self._step(rows)
        return self._so_far

    def evaluate(self, examples: Examples) -> float:
        """Return the mean loss of a token over other rows, which ranks share. Raise StageFailed for one that is no
        number."""
        import torch

        self.model.eval()
        own = list(range(self.rank, len(examples.all), self.ranks))
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(own), self.training.batch_size):
                rows = own[start : start + self.training.batch_size]
                learnt = examples.learnt(rows)
                total += torch.tensor([self._loss(examples, rows).item() * learnt, learnt], dtype=torch.float64)
        loss, learnt = self._sum(total).tolist()
        return self._require_number(loss / learnt, "eval_data")

    def _order(self) -> Order:
        asked = self.training
        rows, each = len(self.examples.all), asked.gradient_accumulation_steps
        return Order(rows, self.ranks, asked.batch_size, each, asked.seed)

    def _go_on(self) -> None:
        """Take up the last state, if there is one of the same kind of device: another one draws other numbers."""
        import torch

        found = read_state(self.folder)
        if found is None or len(found[1][RANDOM][self.rank]) != len(random_state(torch.device(self.device))):
            self._tell()
            return
        self._so_far, tensors = found
        own = {name.removeprefix(ADAPTER): value for name, value in tensors.items() if name.startswith(ADAPTER)}
        load_tensors(self.model, own)
        kept = {name.removeprefix(OPTIMIZER): value for name, value in tensors.items() if name.startswith(OPTIMIZER)}
        restore_optimizer(self._optimizer, list(self._parameters), kept)
        restore_random(tensors[RANDOM][self.rank], torch.device(self.device))
        self._tell()

    def _step(self, rows: Sequence[Sequence[Batch]]) -> None:
        """rows: [rank][batch] → rows."""
        begun, done = time.monotonic(), self._so_far
        learnt = [self.examples.learnt(batch) for batches in rows for batch in batches]
        loss = self._learn(rows[self.rank], sum(learnt))
        done.losses.append(self._require_number(self._share(loss), f"step {done.step + 1}"))
        self._change(done.step)
        done.step, done.tokens = done.step + 1, done.tokens + sum(learnt)
        done.seconds += time.monotonic() - begun
        if done.step % self.training.save_steps == 0 or done.step == self.steps:
            self._save()
        self._tell()

    def _learn(self, batches: Sequence[Batch], learnt: int) -> float:
        """Leave this rank's part of the gradients, and return its part of the mean loss. learnt: tokens of the step."""
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for rows in batches:
            share = self.examples.learnt(rows) / learnt
            loss = self._loss(self.examples, rows)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            total += loss.item() * share
        return total

    def _loss(self, examples: Examples, rows: Batch) -> torch.Tensor:
        """The mean over the tokens of some rows, as the model's class computes it."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point() and not p.requires_grad), None)
        batch = {
            name: value.to(self.device, dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in examples.batch(rows).items()
        }
        found: torch.Tensor = self.model(**batch, use_cache=False).loss
        return found

    def _share(self, loss: float) -> float:
        """The sum of all ranks' parts of a loss, and of the gradients that lie at the parameters."""
        import torch

        if self.ranks == 1:
            return loss
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in self._parameters.values()]
        told = torch.tensor([loss], device=self.device)
        whole = self._sum(torch.cat([told, *(each.float().reshape(-1) for each in gradients)]))
        parts = torch.split(whole[1:], [each.numel() for each in gradients])
        for parameter, part in zip(self._parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return whole[0].item()

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.ranks == 1:
            return tensor
        from accelerate.utils import reduce

        found: torch.Tensor = reduce(tensor.to(self.device), reduction="sum")
        return found

    def _change(self, step: int) -> None:
        """Change the adapter. The rate falls linearly, as transformers' get_linear_schedule_with_warmup has it. Raise
        StageFailed where no numbers would come of it."""
        import torch

        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), MOST_NORM)
        self._require_number(norm.item(), f"step {step + 1}", "norm of the gradients")
        for group in self._optimizer.param_groups:
            group["lr"] = self.training.learning_rate * ((self.steps - step) / self.steps)
        self._optimizer.step()

    def _require_number(self, value: float, where: str, what: str = "loss") -> float:
        if math.isfinite(value):
            return value
        cure = "lower learning_rate, compute in another dtype (float32, bfloat16), or look at the rows"
        raise StageFailed(f"{where}: the {what} is {value}: the training diverged", cure)

    def _save(self) -> None:
        """All ranks' random numbers are in the one file that rank 0 writes, so that no rank is ever ahead."""
        import torch

        own = random_state(torch.device(self.device))
        drawn = [own]
        if self.ranks > 1:
            from accelerate.utils import gather

            drawn = list(torch.split(gather(own.to(self.device)).cpu(), len(own)))
        if self.rank == 0:
            kept = optimizer_tensors(self._optimizer, list(self._parameters))
            save_state(
                self.folder,
                self._so_far,
                {
                    **{ADAPTER + name: value.detach() for name, value in adapter_tensors(self.model).items()},
                    **{OPTIMIZER + name: value for name, value in kept.items()},
                    RANDOM: torch.stack(drawn),
                },
            )

    def _tell(self) -> None:
        done = self._so_far
        words = ""
        if done.losses:
            words = f"loss {done.losses[-1]:.4g}, {done.tokens / max(done.seconds, 1e-9):.0f} tokens/s"
        self.progress(done.step, self.steps, words)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, random numbers come from this seed; outside, as if nothing had been drawn, on every GPU too."""
    import torch
    from transformers import set_seed

    before = random_state(torch.device("cpu"))
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_seed(seed)
    try:
        yield
    finally:
        restore_random(before, torch.device("cpu"))
        torch.cuda.set_rng_state_all(gpus)
