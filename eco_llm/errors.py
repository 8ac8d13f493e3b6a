"""The one exception that means "the user can fix this": one line, exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """A bad flag, file or combination, found before anything is written.

    The message is one line, names the flag or the file, says what is wrong and, where it is known, what to
    do. The command line prints it as `eco_train: error: <message>` and exits with code 2; anything else that
    escapes is a bug and exits with code 1 after leaving a crash report.
    """
