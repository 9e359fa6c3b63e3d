"""What the user sees: rich on a terminal if it is installed, plain lines otherwise."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

try:
    import rich.console
    import rich.progress
    import rich.table
except ImportError:  # rich comes with the extras [demo] and [hf]
    HAVE_RICH = False
else:
    HAVE_RICH = True


class Track:
    """Progress of one run of `total` steps, as a line about every tenth of it."""

    def __init__(self, console: Console, label: str, total: int) -> None:
        self.console, self.label, self.total = console, label, total
        self.start, self.every = time.perf_counter(), max(1, total // 10)

    def update(self, step: int, loss: float, flip_rate: float | None) -> None:
        if step == 1 or step % self.every == 0 or step == self.total:
            spent = time.perf_counter() - self.start
            left = spent / step * (self.total - step)
            head = f"  {self.label:<20} {step:>5}/{self.total}"
            self.console.say(f"{head}  {_values(loss, flip_rate)}  {left:4.0f} s left")


class RichTrack(Track):
    """The same as a bar on a terminal."""

    def __init__(self, console: Console, label: str, total: int, progress: rich.progress.Progress) -> None:
        super().__init__(console, label, total)
        self.progress = progress
        self.task = progress.add_task(label, total=total, values="")

    def update(self, step: int, loss: float, flip_rate: float | None) -> None:
        self.progress.update(self.task, completed=step, values=_values(loss, flip_rate))


class Console:
    """say, table and track, on stdout or (so that stdout stays JSON) on stderr."""

    def __init__(self, to_stderr: bool = False) -> None:
        self.stream = sys.stderr if to_stderr else sys.stdout
        self.rich = rich.console.Console(file=self.stream, highlight=False, soft_wrap=True) if HAVE_RICH else None

    def say(self, text: str = "", style: str = "") -> None:
        if self.rich:
            self.rich.print(text, style=style or None, markup=False)
        else:
            print(text, file=self.stream)
        self.stream.flush()

    def heading(self, text: str) -> None:
        self.say(f"\n{text}", style="bold")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """The first column is text, the others numbers."""
        if self.rich and self.rich.is_terminal:
            table = rich.table.Table(title=title or None, title_justify="left")
            for i, column in enumerate(columns):
                table.add_column(column, justify="right" if i else "left")
            for row in rows:
                table.add_row(*row)
            self.rich.print(table)
            return
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        if title:
            self.say(title)
        for row in [columns, ["-" * width for width in widths], *rows]:
            self.say(
                "  ".join(
                    cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
                ).rstrip()
            )

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Track]:
        if not (self.rich and self.rich.is_terminal):
            yield Track(self, label, total)
            return
        column = rich.progress.TextColumn
        with rich.progress.Progress(
            column("  {task.description:<17}"),
            rich.progress.BarColumn(24),
            rich.progress.TaskProgressColumn(),
            column("{task.fields[values]}"),
            rich.progress.TimeRemainingColumn(compact=True),
            console=self.rich,
        ) as progress:
            yield RichTrack(self, label, total, progress)


def _values(loss: float, flip_rate: float | None) -> str:
    flips = "" if flip_rate is None else f" flips {100 * flip_rate:.2f} %"
    return f"loss {loss:.3f} {loss / math.log(2):.3f} bits/byte{flips}"
