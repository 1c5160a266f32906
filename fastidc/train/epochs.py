"""The official training loop: epochs that are trained, saved and scored."""

import argparse
import logging
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastidc import checkpoint
from fastidc.train.compiled import shown_in
from fastidc.train.engine import Place, Step, fit
from fastidc.train.examiner import Examiner
from fastidc.train.resume import Resumed, Selection, digest, model_file, run_facts, save_optimizer
from fastidc.train.scalars import Scalars
from fastidc.train.session import Session
from fastidc.train.steplog import StepLog


class Training:
    """Epochs of the official loop: train, save, score, remember the best, stop early."""

    def __init__(
        self,
        args: argparse.Namespace,
        log: logging.Logger,
        session: Session,
        examiner: Examiner,
        out: Path,
        resumed: Resumed | None,
        selection: Selection,
    ):
        self.args, self.log, self.session, self.examiner, self.out = args, log, session, examiner, out
        self.world, self.first_epoch = session.world, 0 if resumed is None else resumed.epoch + 1
        self.selection, self.resumed = selection, resumed
        self.last_epoch = self.first_epoch - 1
        self.scalars: Scalars | None = None
        self.losses: list[Tensor] = []
        self.shown = time.perf_counter()

    def go(self) -> None:
        session, args, log = self.session, self.args, self.log
        log.info("***** Running training *****")
        log.info("  Num examples = %d", len(session.loader.samples))
        log.info("  Batch size = %d", args.batch_size // args.gradient_accumulation_steps)
        log.info("  Num steps = %d", session.total_steps * args.gradient_accumulation_steps)
        if self.resumed is not None and not self.selection.knows(self.resumed.epoch):
            self._select(self.resumed.epoch)  # the run ended after the checkpoint and before its score
        if args.tensorboard:
            self.world.on_main(self._open_scalars)
        self.step_log = StepLog(self.out / "log.jsonl", self.world, keep=session.optimizer.steps, scalars=self.scalars)
        done = session.optimizer.steps * session.pairs_a_step
        bar = {"total": session.total_steps * session.pairs_a_step, "initial": done, "unit": "pair", "smoothing": 0.1}
        try:
            with (
                tqdm(desc=args.task_type, disable=None if self.world.is_main else True, **bar) as self.bar,
                shown_in(self.bar, session.policy.compile.active),
            ):
                fit(
                    session.trainer,
                    session.loader,
                    session.recipe,
                    total_steps=session.total_steps,
                    begin=Place(self.first_epoch),
                    on_step=self.on_step,
                    on_epoch=self.on_epoch,
                )
        finally:
            self.step_log.close()
            if self.scalars is not None:
                self.scalars.close()
        best = self.selection.best_epoch
        if best is not None and best != self.last_epoch:
            weights = self.world.on_main(lambda: checkpoint.read(self._best_file(), intra_layers=session.model.config.intra_layers).weights)
            session.model.load_weights(weights, str(self._best_file()))
        self.examiner.final("eval")

    def _open_scalars(self) -> None:
        self.scalars = self.examiner.scalars = Scalars(self.out / "tensorboard")

    def _best_file(self) -> Path:
        return Path(self.selection.best_file)

    def on_step(self, step: Step) -> None:
        args, session = self.args, self.session
        facts = {"step": step.number, "epoch": step.epoch, "lr": step.lrs}
        if session.precision.name == "fp16":
            facts["scaled"] = True
        self.step_log.add(facts, step.loss, step.grad_norm)
        self.losses.append(step.loss)
        self.bar.update(step.pairs)
        if step.number % args.n_display == 0:
            rates = "-".join(f"{rate:.9f}" for rate in sorted(set(session.optimizer.lrs)))
            now = time.perf_counter()
            seconds = (now - self.shown) / (args.n_display * args.gradient_accumulation_steps)
            self.log.info(
                "Epoch: %d/%s, Step: %d/%d, Lr: %s, Loss: %f, Time/step: %f",
                step.epoch + 1, args.epochs, step.passed, session.loader.batches, rates, float(step.loss), seconds,
            )  # fmt: skip
            self.shown = now

    def on_epoch(self, epoch: int) -> bool:
        self.step_log.flush()
        loss = float(self.world.mean(torch.stack(self.losses).float().mean()))
        self.losses.clear()
        self.last_epoch = epoch
        self.log.info("Epoch %d/%s Finished, Train Loss: %f", epoch + 1, self.args.epochs, loss)
        self.log.info(self.session.loader.summary())
        self.world.on_main(lambda: self._save(epoch, loss))
        stop = self._select(epoch)
        self.shown = time.perf_counter()
        return stop

    def _save(self, epoch: int, loss: float) -> None:
        session = self.session
        checkpoint.save_official(model_file(self.out, epoch), session.model.config, dict(session.model.named_parameters()))
        self.log.info("Model saved to %s", model_file(self.out, epoch))
        state = Resumed(epoch, session.stage, loss, session.optimizer.state_dict(), run_facts(session), digest(session.model))
        path = save_optimizer(self.out, state)
        self.log.info("Optimizer saved to %s", path)

    def _select(self, epoch: int) -> bool:
        """Scores an epoch on the chosen split; whether training should stop, which is the same on every process."""
        score = self.examiner.epoch(epoch, self.args.select)
        self.selection.add(epoch, score)
        self.world.on_main(self.selection.save)
        name = "R1" if self.session.stage == "adapt" else "CIDEr"
        self.log.info("The best model is: %s, the %s is: %.4f", self.selection.best_file, name, self.selection.best_score)
        patience = self.session.recipe.patience
        return patience is not None and self.selection.stale > patience
