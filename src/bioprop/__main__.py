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
    if sys.argv[1:2] == ["compare"]:  # many runs, each of which comes back here
        from bioprop.experiments.compare import main as compare

        return compare(sys.argv[2:])
    if sys.argv[1:2] == ["reproduce"]:
        from bioprop.experiments.reproduce import main as reproduce

        return reproduce(sys.argv[2:])
    from bioprop.cli import main

    main()
    return 0


if __name__ == "__main__":
    run()
