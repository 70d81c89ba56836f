"""Lightning's progress bar on stderr, without the number of a single epoch and the version of the logger."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.text import Text

log = logging.getLogger(__name__)


@contextlib.contextmanager
def steps(*names: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that shows which step a command is at: call the function with its name. Without a terminal it is logged."""
    visible = ProgressBar.is_visible()
    with Progress(
        *Progress.get_default_columns()[:2], TimeElapsedColumn(), console=Console(stderr=True), transient=True, disable=not visible
    ) as bar:
        task = bar.add_task("", total=len(names))

        def step(name: str) -> None:
            bar.update(task, description=name, completed=names.index(name))
            if not visible:
                log.info("%s …", name)

        yield step


class ProgressBar(RichProgressBar):
    """A bar for each stage of a run."""

    predict_description = "calibrating"
    test_description = "testing"

    def __init__(self) -> None:
        super().__init__(console_kwargs={"stderr": True})

    @staticmethod
    def is_visible() -> bool:
        """Return whether stderr is a terminal or a notebook, which can show a bar."""
        console = Console(stderr=True)
        return console.is_terminal or console.is_jupyter

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        return "fitting" if epochs == 1 else f"epoch {current_epoch + 1}" + (f" of {epochs}" if epochs and epochs > 0 else "")

    def get_metrics(self, trainer, pl_module) -> dict:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def configure_columns(self, trainer) -> list:
        return [*super().configure_columns(trainer)[:-1], Speed()]  # the last one there shows 0.00 before it knows


class Speed(ProgressColumn):
    """Batches per second, once they are known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g} batches/s", style="progress.data.speed")
