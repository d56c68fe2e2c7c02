"""The files that a trial leaves behind: looked at before it begins, as it may take minutes, and written at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..transport.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def save_figure(figure: Figure, path: Path) -> None:
    """Draw ``figure`` into ``path``, whose ending picks the format, and close it. Raises :class:`ConfigError`."""
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
