"""What a run reports: printed lines, a progress bar, a picture of its losses, and TensorBoard or Weights & Biases."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from apollo_triton.tools.pictures import draw_curve, picture, styles

LABELS = {"apollo": "APOLLO", "mini": "APOLLO-Mini", "q-apollo": "Q-APOLLO", "q-mini": "Q-Mini", "adamw": "AdamW"}


class Reports:
    """The reports of a run. Rank 0 prints and writes them, and the other ranks report nothing."""

    def __init__(self, folder: Path, log: str | None, rank: int, first: int, steps: int) -> None:
        self.folder, self.speaks = folder, rank == 0
        self.losses: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        console = Console(soft_wrap=True, highlight=False)
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TimeRemainingColumn()
        shown = self.speaks and console.is_terminal
        self.progress = Progress(*columns, console=console, disable=not shown, expand=True)
        self.bar = self.progress.add_task("", total=steps, completed=first)
        self.progress.start()
        try:
            self.write = _writer(log, folder, first) if self.speaks and log else None
        except OSError as error:
            self.progress.stop()
            raise SystemExit(f"--log {log}: {error}; leave it out, or give another --folder") from error
        self._since = time.perf_counter()

    def say(self, text: str) -> None:
        if self.speaks:
            self.progress.console.print(text, markup=False)

    def trained(self, step: int) -> None:
        self.progress.update(self.bar, completed=step)

    def loss(self, step: int, loss: float, rate: float, tokens: int) -> None:
        """Report the mean loss since the last report, the learning rate, and ``tokens`` per second since then."""
        now = time.perf_counter()
        speed, self._since = tokens / (now - self._since), now
        self.losses.append((step, loss))
        self.say(f"step {step:6d}   loss {loss:.4f}   lr {rate:.2e}   {speed:,.0f} tokens/s")
        self._log(step, {"loss": loss, "learning rate": rate, "tokens per second": speed})

    def evaluated(self, step: int, loss: float, tokens: int) -> None:
        perplexity = math.exp(min(loss, 700.0))
        self.validation.append((step, loss))
        self.say(f"step {step:6d}   validation loss {loss:.4f}   perplexity {perplexity:.2f}   ({tokens:,} tokens)")
        self._log(step, {"validation loss": loss, "validation perplexity": perplexity})
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "validation": self.validation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.validation = state["losses"], state["validation"]

    def end(self, method: str, about: str) -> None:
        """Close all outputs and draw ``loss.png``."""
        self.progress.stop()
        if self.write is not None:
            self.write(None, {})
        if self.speaks and self.losses:
            try:
                draw(self.folder / "loss.png", method, about, self.losses, self.validation)
            except OSError as error:  # the run itself is saved
                self.say(f"there is no picture of the losses: {error}")
            else:
                self.say(f"{self.folder / 'loss.png'} shows the losses")

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self.write is not None:
            self.write(step, values)


def draw(
    path: Path, method: str, about: str, losses: list[tuple[int, float]], validation: list[tuple[int, float]]
) -> None:
    """Training and validation loss over the steps in the method's colour, 900 x 500 pixels."""
    look = styles([LABELS[method]])[LABELS[method]]
    title = f"Loss of {LABELS[method]}: lower is better"
    with picture(path, title, about, 5) as (_, axes):
        pale = look | {"alpha": 0.5, "linewidth": 1, "markersize": 0 if len(losses) > 2 else 6}
        draw_curve(axes, *zip(*losses, strict=True), label=f"training: {losses[-1][1]:.3f}", **pale)
        if validation:
            loss = validation[-1][1]
            label = f"validation: {loss:.3f}, perplexity {math.exp(min(loss, 700.0)):.2f}"
            draw_curve(axes, *zip(*validation, strict=True), label=label, **look, linewidth=2, markersize=5)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(title="at the end", alignment="left")


def _writer(log: str, folder: Path, first: int) -> Any:
    """A function that logs the values of a step. Called with None as the step, it closes the log."""
    if log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # Do not show what a killed run logged after its last checkpoint.
        board = SummaryWriter(folder / "tensorboard", purge_step=first + 1 if first else None)

        def write(step: int | None, values: dict[str, float]) -> None:
            for name, value in values.items():
                board.add_scalar(name.replace(" ", "_"), value, step)
            if step is None:
                board.close()

        return write
    import wandb

    run = wandb.init(project="apollo-pretraining", name=folder.name, id=folder.name, dir=folder, resume="allow")

    def write_there(step: int | None, values: dict[str, float]) -> None:
        if step is None:
            run.finish()
        else:
            run.log(values, step=step)

    return write_there
