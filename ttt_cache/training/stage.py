"""One stage of a run: its optimizer, its lanes, and its steps, which resume exactly."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint
from .carry import Carry
from .data import SegmentStream
from .finite import NotFiniteError, check_finite
from .model import choose_trained
from .monitor import Observed, figures_of
from .restore import read_states, restore
from .schedule import optimizer_for
from .step import Lane, Objective, Predictor, distil, fine_tune

if TYPE_CHECKING:
    from .engine import Run

OBSERVE_EVERY = 10  # steps between two looks at the gates, each of which costs a forward pass


class StageRun:
    """The steps of one stage.

    Args:
        run: model, data, settings and records.
        index: which stage.
        before: steps of the stages before it.
    """

    def __init__(self, run: Run, index: int, before: int) -> None:
        self.run, self.index, self.before = run, index, before
        self.stage = run.settings.ttt_cache.stages[index]
        self.steps = run.settings.steps_of(self.stage)
        self.done = 0
        self.saved = -1
        # The figures of the last step, until all of its lines are written.
        self.unreported: dict[str, float] | None = None
        self._between = False  # of the weights of two steps: nothing may be saved then
        choose_trained(run.lm, run.handle, run.settings, self.stage.train)
        self.trained = [p for p in run.lm.parameters() if p.requires_grad]
        optim = run.settings.optim
        lr = optim.lr if self.stage.lr is None else self.stage.lr
        optimizer, self.schedule = optimizer_for(
            self.trained, lr, optim.weight_decay, self.steps, optim.pct_start
        )
        self.model, prepared = run.accelerator.prepare(Predictor(run.lm), optimizer)
        self.optimizer = prepared.optimizer
        self.lanes = [self._lane(number) for number in range(run.settings.num_microbatches)]

    def _lane(self, number: int) -> Lane:
        run, settings = self.run, self.run.settings
        size, lanes = settings.batch_size, settings.num_microbatches
        first = (run.accelerator.process_index * lanes + number) * size
        stream = SegmentStream(
            run.data,
            run.facts,
            total_rows=run.rows,
            rows=range(first, first + size),
            seed=settings.seed + self.index,
            shuffle=settings.data.shuffle,
        )
        matched = settings.ttt_cache.distillation_weight > 0 and self.stage.train != "distill"
        return Lane(stream, Carry(run.handle), Carry(run.handle, {}) if matched else None)

    def train(self) -> None:
        """Take the steps that are left. An error leaves a checkpoint of the steps before it."""
        self._remember()
        self.saved = self.done
        try:
            self._report()  # what an interruption left of it
            while self.done < self.steps:
                self._update(*self._learn())
                self._report()
            self._save()
        except BaseException as error:
            # Of several processes the others may not be here; only this error reaches all.
            together = isinstance(error, NotFiniteError) or self.run.accelerator.num_processes == 1
            if together and not self._between:
                self._save()
            raise

    def resume(self, folder: Path, position: dict[str, Any]) -> None:
        """Go on from a checkpoint of this stage."""
        restore(folder, self.model, self.optimizer)
        self.done, self.unreported = position["stage_step"], position["unreported"]
        self.schedule.load_state_dict(position["schedule"])
        states = read_states(folder, position)
        for lane in self.lanes:
            lane.stream.load_state_dict(position["stream"])
            rows = lane.stream.rows
            mine = {
                name: tensor[rows.start : rows.stop].to(self.run.accelerator.device)
                for name, tensor in states.items()
            }
            for name, carry in lane.carries().items():
                prefix = f"{name}."
                own = {k.removeprefix(prefix): v for k, v in mine.items() if k.startswith(prefix)}
                try:
                    carry.load(own, len(rows))
                except ValueError as error:
                    raise ValueError(f"{folder}: carry-*.safetensors: {error}") from error

    def _learn(self) -> tuple[dict[str, float], dict[int, Observed]]:
        """Gradients of one step, and what was measured on the way."""
        run, started = self.run, time.perf_counter()
        frames = run.settings.frames_of(self.stage, self.done)
        batches = [lane.stream.next_batch(frames) for lane in self.lanes]
        self.optimizer.zero_grad()
        handle = run.handle if run.main and self._looks(self.done) else None
        if self.stage.train == "distill":
            losses, observed = distil(run.accelerator, run.lm, run.handle, batches, handle)
        else:
            objective = Objective(run.weights, run.settings.ttt_cache.distillation_weight)
            args = (run.accelerator, self.model, self.lanes, batches, objective, handle)
            losses, observed = fine_tune(*args)
        for parameter in self.trained:
            if parameter.grad is None:  # not reached, as a memory that nothing was written to
                parameter.grad = torch.zeros_like(parameter)  # the optimizer's state must be whole
        figures = {name: float(loss) for name, loss in losses.items()}
        norm = run.accelerator.clip_grad_norm_(self.trained, run.settings.max_norm)
        figures["grad_norm"] = float(norm) if norm is not None else 0.0
        seconds = time.perf_counter() - started
        tokens = run.rows * frames * (1 + run.facts.dep_q)
        figures |= {"seconds": seconds, "tokens_per_second": tokens / seconds, "frames": frames}
        return figures | {"lr": self.schedule.get_last_lr()[0]}, observed

    def _looks(self, step: int) -> bool:
        """Whether the gates are looked at in a step of the stage, counted from 0."""
        return step % OBSERVE_EVERY == 0 or step == self.steps - 1

    def _update(self, figures: dict[str, float], observed: dict[int, Observed]) -> None:
        """Take the step, unless something is not finite."""
        check_finite(figures, self.run.settings, self.index, self.before + self.done)
        self._between = True
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        self.run.observed = observed or self.run.observed
        self.unreported = figures | figures_of(observed)
        self._remember()
        self._between = False

    def _report(self) -> None:
        """Write down a step, and evaluate and save where it is time to.

        Until all of its lines are there a checkpoint has its figures: a run that goes on from it
        begins with writing them.
        """
        run, settings, step = self.run, self.run.settings, self.before + self.done
        if self.unreported is None:
            return
        if self._looks(self.done - 1) or step % settings.log_freq == 0:
            run.recorder.log(step, self.unreported, self.stage.train)
        if settings.do_eval and settings.eval_freq and step % settings.eval_freq == 0:
            found = {f"eval/{name}": loss for name, loss in run.evaluate().items()}
            run.recorder.log(step, found, self.stage.train)
        self.unreported = None
        if settings.ckpt_freq and step % settings.ckpt_freq == 0:
            self._save()

    def _remember(self) -> None:
        """What goes with the weights as they are: an unfinished step is begun again from here."""
        self._position = {
            "step": self.before + self.done,
            "stage": self.index,
            "stage_step": self.done,
            "stream": self.lanes[0].stream.state_dict(),
            "schedule": self.schedule.state_dict(),
            "before": self.run.before,
            "observed": {n: vars(of) for n, of in self.run.observed.items()},
            "made_from": {key: source.identity for key, source in self.run.sources.items()},
        }
        lanes = [
            {
                f"{name}.{key}": tensor
                for name, carry in lane.carries().items()
                for key, tensor in carry.tensors().items()
            }
            for lane in self.lanes
        ]
        self._states = {key: [lane[key] for lane in lanes] for key in lanes[0]}

    def _save(self) -> None:
        run = self.run
        if not run.settings.do_ckpt or self.saved == self.done:
            return
        run.recorder.sync()
        checkpoint.save(
            run.accelerator,
            run.run_dir,
            self.model,
            run.lm,
            self.optimizer,
            self._position | {"unreported": self.unreported},
            {key: torch.cat(parts) for key, parts in self._states.items()},
            run.settings.num_ckpt_keep,
        )
        self.saved = self.done
