"""The command line, ``bioprop`` or ``python -m bioprop``: which command runs.

Nothing heavy is imported before Ctrl-C is looked after: torch and Lightning take seconds to import.
"""

import sys

from bioprop.commands import conduct


def run() -> None:
    """Run the command that the process was called with.

    Raises:
        SystemExit: with the status that `bioprop.commands.conduct` tells.
    """
    sys.path.insert(0, "")  # a user's own classes, named by dotted path, as with `python -m bioprop`
    conduct(_command)


def _command() -> int:
    from bioprop.front import answer, rewritten

    words = sys.argv[1:]
    if answer(words):  # help, and mistakes that are seen without torch
        return 0
    command, *rest = words
    if command == "compare":  # many runs, each of which comes back here
        from bioprop.experiments.compare import main as compare

        return compare(rest)
    if command == "reproduce":
        from bioprop.experiments.reproduce import main as reproduce

        return reproduce(rest)
    if command == "check":
        from bioprop.experiments.check import main as check

        return check(rest)
    if command == "export":
        from bioprop.experiments.export import main as export

        return export(rest)
    from bioprop.cli import main

    sys.argv[1:] = rewritten(words)
    main()
    return 0


if __name__ == "__main__":
    run()
