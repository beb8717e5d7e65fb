"""Run the command line with ``python -m bioprop``."""

from bioprop.cli import run

if __name__ == "__main__":
    run()
