"""The command line, ``bioprop`` or ``python -m bioprop``: which command runs, and how the process ends.

Nothing heavy is imported before Ctrl-C is looked after: torch and Lightning take seconds to import.
"""

import signal
import sys

from bioprop.errors import UserError

#: What shells take for a process that Ctrl-C ended.
INTERRUPTED = 128 + signal.SIGINT


def run() -> None:
    """Run the command that the process was called with.

    Raises:
        SystemExit: with status 2 and one sentence on a user's mistake, with 130 on Ctrl-C, with 143 on SIGTERM.
    """
    sys.path.insert(0, "")  # a user's own classes, named by dotted path, as with `python -m bioprop`
    try:
        if sys.argv[1:2] == ["compare"]:  # many runs, each of which comes back here
            from bioprop.experiments.compare import main as compare

            sys.exit(compare(sys.argv[2:]))
        from bioprop.cli import main

        main()
    except UserError as error:
        from bioprop.distributed import LostProcessError, wait_for_the_first

        wait_for_the_first()
        sys.stderr.write(f"bioprop: error: {error}\n")
        sys.exit(1 if isinstance(error, LostProcessError) else 2)
    except (KeyboardInterrupt, SystemExit) as left:  # Lightning turns the former into the latter, with status 1
        if isinstance(left, KeyboardInterrupt) or isinstance(left.__context__, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    run()
