"""The command ``ebbtide``. Importing this imports nothing else; `main` does, when it is called."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command with the arguments of this process; returns its exit code."""
    from ebbtide.errors import EbbtideError

    try:
        if hasattr(sys.stdout, "reconfigure"):  # what the terminal cannot show is shown as \\u...
            sys.stdout.reconfigure(errors="backslashreplace")
        _need_packages()
        from ebbtide.cli.app import start

        return start(sys.argv[1:])
    except EbbtideError as error:  # the packages are missing, or the environment sets no setting
        print(f"ebbtide: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _need_packages() -> None:
    """See that the packages of the extra are there.

    Raises:
        MissingExtraError: One is not; names the command that installs them.
    """
    from ebbtide.errors import MissingExtraError

    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"The command needs the package {error.name}, which is not installed:"
            " pip install 'ebbtide[cli]'",
            extra="cli",
        ) from None
