"""Show the progress of a run: a moving bar on a terminal, lines of a log elsewhere."""

import sys
import time
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

LINE_EVERY = 60.0  # seconds between two lines within an epoch, where the output is not a terminal
DRAW_EVERY = 0.2  # seconds between two drawings of the bar
FRESH = 0.9  # weight of earlier updates in the running mean of their duration


class Progress(ProgressBar):
    """Print a line after each epoch: its errors and loss, the images per second, and the time that is left.

        epoch 12/90  train 61.2%  val 58.4%  loss 2.71  3,100 images/s  left 3 h 10 min

    The errors are top-1, of training images before their updates and of one view of the validation images. Within an epoch,
    a terminal has a bar, and other outputs a line per minute. Epochs count from 1.

    every: number of updates between two looks at the training loss, for which a GPU would have to be waited for.
    """

    def __init__(self, every: int = 1, output: TextIO | None = None) -> None:
        super().__init__()
        self.every = every
        self._output = output
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._update: float | None = None  # seconds of an update, running mean
        self._images = 0.0  # images of an update
        self._between = 0.0  # seconds from the last update of an epoch to its end: validation and saving
        self._printed = 0  # epochs of the history whose line is printed
        self._updated = self._told = 0.0  # when the last update ended, and when the last line was printed

    @property
    def output(self) -> TextIO:
        """Where the lines go; what sys.stdout is now, unless another was given."""
        return self._output or sys.stdout

    def disable(self) -> None:
        """Print nothing, as Lightning wants it in all processes but one."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def print(self, *parts: Any, **options: Any) -> None:
        """Print a line without disturbing the bar."""
        if self._enabled:
            tqdm.write(" ".join(map(str, parts)), file=self.output)
            self.output.flush()

    def _start(self, what: str, total: float) -> None:
        self._told = self._updated = time.monotonic()
        if self._enabled and self.output.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {unit}"
            self._bar = tqdm(
                total=int(total),
                desc=what,
                leave=False,
                file=self.output,
                dynamic_ncols=True,
                bar_format=layout,
                unit="",
            )

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the epoch before, and begin the bar of this one."""
        self._print_epochs(trainer, pl_module)
        self._start(name_of_epoch(trainer, trainer.current_epoch + 1), trainer.num_training_batches)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar of an epoch that is resumed in the middle, for which Lightning calls no other hook."""
        self._printed = len(pl_module.history)  # type: ignore[arg-type]
        if trainer.fit_loop.restarted_mid_epoch:
            self._start(name_of_epoch(trainer, trainer.current_epoch + 1), trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the time of the update; move the bar, or print a line if the last one is a minute old."""
        now = time.monotonic()
        seconds, self._updated = now - self._updated, now
        if batch_idx > 0 or self._update is None:  # the first update of an epoch waits for its loader
            self._update = seconds if self._update is None else FRESH * self._update + (1 - FRESH) * seconds
            self._images = batch.global_batch_size if hasattr(batch, "global_batch_size") else len(batch[0])
        if not self._enabled or (batch_idx + 1) % self.every:
            return
        if self._bar is not None:
            if now - self._told >= DRAW_EVERY:
                self._told, self._bar.n = now, batch_idx + 1
                self._bar.unit = "  ".join(self._facts(trainer, batch_idx + 1))  # shown after the bar
                self._bar.refresh()
        elif now - self._told >= LINE_EVERY:
            self._told = now
            share = 100 * (batch_idx + 1) / trainer.num_training_batches
            name = name_of_epoch(trainer, trainer.current_epoch + 1)
            self.print("  ".join([f"{name}  {share:.0f}%", *self._facts(trainer, batch_idx + 1)]))

    def _facts(self, trainer: L.Trainer, done: int) -> list[str]:
        """Return the loss, the speed and the time left after ``done`` updates of the current epoch."""
        metrics = trainer.callback_metrics
        loss = [f"loss {float(metrics['train/loss']):.3f}"] if "train/loss" in metrics else []
        return [*loss, *self._speed(trainer, done)]

    def _speed(self, trainer: L.Trainer, done: int) -> list[str]:
        """Return the images per second, and the time left after ``done`` updates of the current epoch.

        It is the time of the updates and validations that are left, without the final measurement.
        """
        if not self._update:
            return []
        epochs = max(0, (trainer.max_epochs or 0) - trainer.current_epoch)
        seconds = (epochs * trainer.num_training_batches - done) * self._update + epochs * self._between
        left = [f"left {in_words(seconds)}"] if seconds > 0 else []
        return [f"{self._images / self._update:,.0f} images/s", *left]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the bar. The line of the epoch follows when the epoch is saved."""
        self._end()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the last epoch."""
        self._print_epochs(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the bar, so that what comes next begins on a line of its own."""
        self._end()

    def _print_epochs(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print the line of each epoch of the classifier's history that has none yet."""
        for entry in pl_module.history[self._printed :]:
            self._between = time.monotonic() - self._updated
            parts = [name_of_epoch(trainer, entry["epoch"]), f"train {entry['train_error']:.1f}%"]
            parts += [f"{split} {entry[key]:.1f}%" for split in ("val", "test") if (key := f"{split}_error") in entry]
            parts += [f"loss {entry['train_loss']:.3f}", *self._speed(trainer, 0)]
            self.print("  ".join(parts))
        self._printed = len(pl_module.history)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a bar."""
        self._end()
        self._start("validation", sum(trainer.num_val_batches))

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a bar."""
        self._start("measuring", sum(trainer.num_predict_batches))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Move the bar, or print a line if the last one is a minute old."""
        if self._bar is not None:
            self._bar.update()
        elif time.monotonic() - self._told >= LINE_EVERY:
            self._told = time.monotonic()
            self.print(f"measuring  {100 * (batch_idx + 1) / sum(trainer.num_predict_batches):.0f}%")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the bar."""
        self._end()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the bar."""
        self._end()


def name_of_epoch(trainer: L.Trainer, number: int) -> str:
    """Return "epoch 12/90"."""
    total = trainer.max_epochs
    return f"epoch {str(number).rjust(len(str(total)))}/{total}" if total and total > 0 else f"epoch {number}"


def in_words(seconds: float) -> str:
    """Return a duration in words: 40 s, 7 min, 3 h 10 min, 2 d 4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"
