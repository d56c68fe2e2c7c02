"""Where exception groups end: nurseries raise groups, users read one sentence."""

from __future__ import annotations

from ..transport.errors import LocalError, ShoalError


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions of a (nested) group in order, or the one exception."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


def first_error(group: BaseException) -> BaseException:
    """The one exception to show for ``group``.

    What nobody planned for (a bug, an interrupt, an error of the user's own code) comes before a
    :class:`LocalError`, and that before a remote error: it is the cause more often than the effect.
    """

    def rank(error: BaseException) -> int:
        return 2 if isinstance(error, LocalError) else 3 if isinstance(error, ShoalError) else 1

    return min(leaves(group), key=rank)
