"""The files that a trial leaves behind: looked at before it begins, as it may take minutes, and written at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..transport.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


def check_outputs(*paths: Path | None) -> None:
    """Raise :class:`ConfigError`, naming it, for a path at which no file can be written; None stands for no file."""
    for path in paths:
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {path.absolute().parent}")
        if path.is_dir():
            raise ConfigError(f"cannot write {path}: it is a folder; name a file in it")


def write_text(path: Path, text: str) -> None:
    """Raises :class:`ConfigError` naming the file."""
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def leave_behind(
    console: Console, as_json: Callable[[], str], draw: Callable[[Path], None], json: Path | None, plot: Path | None
) -> None:
    """What a trial found, in the files that were asked for. Raises :class:`ConfigError` naming one."""
    if json is not None:
        write_text(json, as_json())
    if plot is not None:
        draw(plot)
        console.print(f"wrote {plot}")


def tell(console: Console, verdicts: Sequence[tuple[bool, str]]) -> int:
    """Say what holds and what does not; the exit status of a trial: 0 if all does."""
    for holds, text in verdicts:
        console.print(f"{'[green]holds[/]' if holds else '[bold red]does not hold[/]'}  {text}", soft_wrap=True)
    return 0 if all(holds for holds, _ in verdicts) else 1


def save_figure(figure: Figure, path: Path) -> None:
    """Draw ``figure`` into ``path``, whose ending picks the format, and close it. Raises :class:`ConfigError`."""
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
