"""One stage of training with its folder: what is written when, what a signal ends and where it goes on."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from tqdm import tqdm

from fastidc import checkpoint
from fastidc.config import Preset, TrainOptions
from fastidc.data.records import PairRecord
from fastidc.errors import FastidcError, Interrupted, NotFiniteError
from fastidc.files import append_line, write_json
from fastidc.train import progress, snapshot
from fastidc.train.compiled import shown_in
from fastidc.train.engine import Place, Step, fit
from fastidc.train.final import score_test, write_about_change
from fastidc.train.identity import facts
from fastidc.train.keeper import Keeper
from fastidc.train.ledger import LEDGER_FILE, Ledger
from fastidc.train.progress import Progress
from fastidc.train.rows import cut
from fastidc.train.scalars import Scalars
from fastidc.train.session import Session
from fastidc.train.signals import AtOnce, Signals, name_of
from fastidc.train.start import LOG_FILE, METRICS_FILE, SCORES_FILE, Start, take_over
from fastidc.train.steplog import StepLog
from fastidc.train.watchdog import Watchdog

T = TypeVar("T")
MOST_ROLLBACKS = 8  # the rate is then 1/256 of the recipe's, and it was not the rate


class StageRun:
    """One stage with its folder: what is written when."""

    def __init__(
        self,
        options: TrainOptions,
        chosen: Preset,
        dataset: str,
        session: Session,
        records: dict[str, list[PairRecord]],
        identity: dict,
        left_out: dict | None = None,
    ):
        self.options, self.out, self.session, self.records, self.world = options, options.out, session, records, session.world
        self.identity, self.left_out, self.progress = identity, left_out, Progress()
        self.started = time.perf_counter()
        self.facts = facts(options, chosen, dataset, session)
        self.scalars: Scalars | None = None
        self.scoring = False  # the model's weights are those of the kept epoch, not of the last step
        self.signals = Signals(options.preemption_signal, self.world.size > 1)
        self._random: tuple[dict, dict] | None = None
        self._place = options.out.stat() if session.world.is_main else None

    def say(self, sentence: str) -> None:
        if self.world.is_main:
            tqdm.write(sentence)

    def go_on_from(self, start: Start | None) -> None:
        """Takes up a run where a snapshot has it; ``start`` is known to the first process, and all call."""
        self.world.on_main(lambda: None if start is None else take_over(start, self.out))
        self._put_back(None if start is None else start.snapshot)
        place = self.progress.place
        self.say(f"{self.out}: goes on after step {self.session.optimizer.steps} (epoch {place.epoch + 1}, batch {place.passed}).")

    def _put_back(self, found: snapshot.Snapshot | None) -> None:
        source, state = self.world.broadcast(None if found is None else (str(found.path), found.state))
        tensors = {} if found is None else found.tensors
        self.progress = Progress.of(state, source)
        progress.put_back(self.session, tensors, state, source)
        random = {name: x.clone() for name, x in self.world.broadcast_tensors(tensors.get("random"), self.session.device)}
        self._random = random, state
        self.started = time.perf_counter() - self.progress.seconds

    def go(self) -> dict:
        session, out = self.session, self.out
        self.world.on_main(lambda: checkpoint.write_config(out, session.model.config, self.facts))
        with ExitStack() as stack:
            stack.enter_context(self.signals)
            self.watchdog = stack.enter_context(Watchdog(self.options.watchdog, self.world))
            self.keeper = Keeper(out / snapshot.FOLDER, self.options, self.world, self.signals, self.say)
            stack.callback(self.keeper.close)
            if self.options.tensorboard:
                self.world.on_main(self._open_scalars)
            if not self.progress.done:
                self.train()
            if self.world.is_main:
                tqdm.write(session.loader.summary())
            metrics = self.scores()
        self._written(lambda: write_json(out / METRICS_FILE, metrics))
        self.world.on_main(lambda: snapshot.clear(out / snapshot.FOLDER))
        if self.scalars is not None:
            self.scalars.close()
        return metrics

    def _written(self, write: Callable[[], T]) -> T:
        """``write()`` on the first process, where the run folder is still that in which the run began: in one made anew half a run would lie."""

        def run() -> T:
            try:
                same = os.path.samestat(self._place, self.out.stat())
            except OSError:
                same = False
            if not same:
                raise FastidcError(f"{self.out}: was taken away during the run; put it back, then go on with --resume auto.")
            return write()

        return self.world.on_main(run)

    def _open_scalars(self) -> None:
        self.scalars = Scalars(self.out / "tensorboard", after=self.session.optimizer.steps)

    def _open_logs(self) -> None:
        """Their rows up to the step where the run stands stay."""
        steps, options = self.session.optimizer.steps, self.options
        most = options.nonfinite_steps if options.on_nonfinite == "rollback" else 1
        how = {"scalars": self.scalars, "most": most, "spikes": True, "counts": self.progress.counts}
        self.world.on_main(lambda: cut(self.out / SCORES_FILE, "epoch", self.progress.place.epoch - 1))
        self.log = StepLog(self.out / LOG_FILE, self.world, keep=steps, **how)
        self.ledger = Ledger(self.out / LEDGER_FILE, self.world, keep=steps)

    def train(self) -> None:
        session = self.session
        total, spikes = session.total_steps * session.pairs_a_step, []
        with (
            tqdm(total=total, desc=session.stage, unit="pair", smoothing=0.1, disable=not self.world.is_main) as self.bar,
            shown_in(self.bar, session.policy.compile.active),
        ):
            while True:
                self._open_logs()
                self.bar.n = session.optimizer.steps * session.pairs_a_step
                self.keeper.start_counting(session.optimizer.steps)
                if session.optimizer.steps == 0 and self.options.on_nonfinite == "rollback":
                    self.save()  # what a first step can go back to
                try:
                    self._fit()
                    self.progress.done = True
                    if self.keeper.saves:  # the scores that follow may take long, and leave other weights in the model
                        self.save()
                    break
                except NotFiniteError as error:
                    self._roll_back(error)
                finally:
                    self.log.close()
                    self.ledger.close()
                    spikes += self.log.spikes
        if spikes:
            step, deviations = max(spikes, key=lambda spike: spike[1])
            self.say(f"{len(spikes)} losses stood far above those before, the farthest at step {step}, by {deviations:.0f} deviations.")

    def _fit(self) -> None:
        session = self.session
        fit(
            session.trainer,
            session.loader,
            session.recipe,
            total_steps=session.total_steps,
            begin=self.progress.place,
            ready=lambda: progress.put_back_random(session, *self._random),
            on_step=self.on_step,
            on_epoch=self.on_epoch,
            until=lambda: bool(self.keeper.stopping),
            now=lambda phase: self.watchdog.now(phase, session.optimizer.steps + 1),
        )
        if self.keeper.stopping:
            self.stop()

    def on_step(self, step: Step) -> None:
        facts = {"step": step.number, "epoch": step.epoch, "lr": step.lrs, "seconds": round(time.perf_counter() - self.started, 3)}
        if self.session.precision.name == "fp16":
            facts["scaled"] = True
        self.ledger.add(step.number, step.epoch, step.ids)
        self.log.add(facts, step.loss, step.grad_norm)
        self.bar.update(step.pairs)
        if self.session.device.type == "cpu" or step.number % 50 == 0:
            self.bar.set_postfix_str(f"loss {float(step.loss):.3f}", refresh=False)
        self.progress.place = Place(step.epoch, step.passed)
        if self.keeper.look(step.number) and not self.keeper.stopping:
            self.save()
        self.keeper.tell()

    def on_epoch(self, epoch: int) -> bool:
        steps = self.session.optimizer.steps
        self.log.flush()
        self.keeper.look(steps, now=True)
        if self.keeper.stopping:
            return True
        self.watchdog.now("scoring", steps)
        stop = self._select(epoch)
        self.progress.place, self.progress.done = Place(epoch + 1, 0), stop
        if self.keeper.look(steps, now=True) and not self.keeper.stopping and not stop:
            self.save()
        return stop or bool(self.keeper.stopping)

    def _select(self, epoch: int) -> bool:
        """Scores an epoch, keeps it where it is the best, and says whether it was the last."""
        recipe, judge, known = self.session.recipe, self.session.judge, self.progress
        if recipe.select == "last":
            return False
        self.session.gather()
        with self._leaves():
            score, metrics = judge.score(self.records[recipe.select])
        row = {"epoch": epoch, "split": recipe.select, "criterion": judge.criterion, "score": score}
        self._written(lambda: append_line(self.out / SCORES_FILE, row))
        if self.scalars is not None:
            self.scalars.add({judge.criterion: score}, self.session.optimizer.steps, recipe.select)
        known.stale += 1
        if known.best is None or score >= known.best["score"]:  # a later epoch wins ties, as officially
            known.best = {"epoch": epoch, "score": score, "criterion": judge.criterion, "split": recipe.select, recipe.select: metrics}
            known.stale = 0
            self.save_weights()
        stop = recipe.patience is not None and known.stale > recipe.patience
        self.say(f"epoch {epoch + 1}: {recipe.select} {judge.criterion} {score:.4f}")
        if stop:
            best = known.best["epoch"] + 1
            self.say(f"stopped: {known.stale} epochs in a row without a better {judge.criterion}; epoch {best} is kept.")
        return stop

    @contextmanager
    def _leaves(self) -> Iterator[None]:
        """Around scores: alone, a process that is told to end leaves them at once; of several none can leave the others waiting."""
        if self.world.size > 1:
            yield
            return
        try:
            with self.signals.at_once():
                yield
        except AtOnce:
            self.keeper.stopping = self.signals.number
            self.stop()

    def save_weights(self) -> None:
        model = self.session.gather()
        self._written(lambda: checkpoint.save(self.out, model.config, dict(model.named_parameters()), self.facts))

    def save(self) -> None:
        """A snapshot of now, unless the last step may have harmed the weights."""
        session, known = self.session, self.progress
        self.watchdog.now("saving", session.optimizer.steps)
        self._written(lambda: None)
        self.log.flush(to_disk=True)
        self.ledger.flush(to_disk=True)
        if self.log.harmed:
            return
        known.counts, known.seconds = self.log.counts, time.perf_counter() - self.started
        best = None if known.best is None else self.out / checkpoint.WEIGHTS_FILE
        tensors = progress.captured(session)
        self.keeper.save(session.optimizer.steps, tensors, known.state(session, self.identity), best)

    def stop(self) -> None:
        """Saves, and ends the run at the signal that all have agreed on."""
        if not self.scoring and not self.keeper.has(self.session.optimizer.steps):
            self.save()
        path, number = self.keeper.finish(), self.keeper.stopping
        held = f"go on with --resume auto from {path}" if path is not None else "nothing was saved yet: start again"
        raise Interrupted(f"{name_of(number)} at step {self.session.optimizer.steps}; {held}.", self.signals.code(number))

    def _roll_back(self, error: NotFiniteError) -> None:
        known, at, slowed = self.progress, self.session.optimizer.steps, self.session.optimizer.slowed / 2
        rollbacks = known.rollbacks
        if self.options.on_nonfinite == "stop":
            raise error
        self.keeper.finish()
        found: list[snapshot.Snapshot | None] = [None]

        def find() -> None:
            found[0] = snapshot.newest(self.keeper.folder, self.say)
            if found[0] is None:
                raise FastidcError(f"{error} There is no snapshot to go back to.")
            if len(rollbacks) >= MOST_ROLLBACKS:
                raise FastidcError(
                    f"{error} The run has gone back {len(rollbacks)} times already, to a rate that is {2 * slowed:g} of the recipe's."
                )

        self.world.on_main(find)
        self._put_back(found[0])
        steps = self.session.optimizer.steps
        self.session.optimizer.slowed = slowed
        self.progress.rollbacks = [*rollbacks, {"at": at, "to": steps, "slowed": slowed}]
        self.say(f"{error} Back to step {steps}, with {slowed:g} of the recipe's rate (--on-nonfinite rollback).")

    def scores(self) -> dict:
        """What a run ends with: the kept epoch's weights in the folder and in the model, and its scores."""
        session, out, best = self.session, self.out, self.progress.best
        self.watchdog.now("scoring", session.optimizer.steps)
        self.scoring = True
        if best is None:
            self.save_weights()
        else:
            session.whole.load_weights(self.world.on_main(lambda: checkpoint.read(out).weights), str(out))
        metrics = {"stage": session.stage, "dataset": self.facts["run"]["dataset"], "selected": best, "splits": {}}
        if self.left_out is not None:
            metrics["left_out"] = self.left_out
        if self.progress.rollbacks:
            metrics["rollbacks"] = self.progress.rollbacks
        with self._leaves():
            if session.stage == "finetune":
                write_about_change(out, session, self.records, self._written)
            if self.records["test"]:
                score_test(out, session, self.records["test"], metrics, self._written)
        return metrics
