"""What the user sees while work goes on: messages, and progress that suits terminal and pod alike.

Everything here goes to stderr; stdout is for data. A terminal gets a bar, a pod one line a tick.
"""

from __future__ import annotations

import shutil
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

TICK_SECONDS = 10.0


def plain(text: str) -> str:
    """Return text without what steers a terminal: names of files and people may hold anything."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text
    )


def say(message: str) -> None:
    """Print one line for the user."""
    tqdm.write(plain(message), file=sys.stderr)


def warn(message: str, hint: str | None = None) -> None:
    """Print a warning, with a hint where there is one."""
    say(f"warning: {message}" + (f"\n  hint: {hint}" if hint else ""))


class Progress:
    """Progress of one phase: a bar on a terminal, else one line every `TICK_SECONDS`."""

    def __init__(self, label: str, total: int, *, unit: str = "step") -> None:
        self.label, self.total, self.unit = label, total, unit
        self._start = self._last = time.monotonic()
        self._done = 0
        self._bar: Any = None
        if sys.stderr.isatty():
            width = None if shutil.get_terminal_size((0, 0)).columns else 80
            bar = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit}s [{elapsed}{postfix}]"
            self._bar = tqdm(
                total=total, desc=label, unit=unit, file=sys.stderr, bar_format=bar, ncols=width
            )

    def update(self, done: int, **figures: float | str) -> None:
        """Show that `done` of `total` is done, with some figures such as the loss."""
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix(figures, refresh=False)
            self._bar.refresh()
        elif time.monotonic() - self._last >= TICK_SECONDS or self._done < done == self.total:
            self._done = done
            self._last = time.monotonic()
            extra = "".join(
                f"  {name} {value:.4g}" if isinstance(value, float) else f"  {name} {value}"
                for name, value in figures.items()
            )
            spent = self._last - self._start
            say(f"{self.label}: {done}/{self.total} {self.unit}s  {spent:.0f} s{extra}")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


OnTick = Callable[[int, int, dict[str, float]], None]  # done, total, figures


class Upkeep:
    """What a long loop calls once an iteration: heartbeat, checkpoints, and whether to stop.

    `on_tick(done, total, figures)` is called at most every `seconds` and once at the end. `tick`
    returns True when the loop should write a checkpoint: when it must stop, and otherwise at ticks,
    but so seldom that writing takes no more than about 1/`THRIFT` of the time. `stopping()` is True
    after SIGTERM. `on_saved()` is called some time after a checkpoint that `tick` asked for was
    written.
    """

    THRIFT = 50

    def __init__(
        self,
        on_tick: OnTick | None = None,
        stopping: Callable[[], bool] = lambda: False,
        seconds: float = TICK_SECONDS,
        on_saved: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_tick, self.stopping, self.seconds = on_tick, stopping, seconds
        self._on_saved = on_saved
        self._last = self._saved = time.monotonic()
        self._saving = False
        self._pause = seconds

    def tick(self, done: int, total: int, **figures: float) -> bool:
        """Report that `done` of `total` iterations are done; True: write a checkpoint now."""
        now = time.monotonic()
        if self._saving:  # the last call asked for a checkpoint, which has been written since
            self._on_saved()
            now = time.monotonic()
            self._pause = max(self.seconds, self.THRIFT * (now - self._saved))
            self._saving = False
        if done < total and not self.stopping() and now - self._last < self.seconds:
            return False
        self._last = now
        if self._on_tick is not None:
            self._on_tick(done, total, figures)
        if not self.stopping() and now - self._saved < self._pause:
            return False
        self._saved, self._saving = now, True
        return True
