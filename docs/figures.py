"""The figures on the pages of `docs/algorithms/`, copied from the tables of `docs/results/`.

    python -m docs.figures

rewrites what lies between the marks ``<!-- figures: names -->`` and ``<!-- end of figures -->`` of every page, where
the names are those of the tables' rows.
"""

import re
from pathlib import Path

from bioprop.experiments.names import METHODS

DOCS = Path(__file__).parent
MARKS = re.compile(r"(<!-- figures: (.+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
#: The tables that have figures for the pages, in their order, and the words that tell the data apart.
TABLES = {
    "digits": "digits, LeNet, 12 epochs",
    "digits_ldrl": "digits, LeNet, 12 epochs",
    "digits_ldrlpublished": "digits, LeNet, 12 epochs",
    "gait": "digits, InvertibleMLP, 12 epochs",
    "cifar10": "3,200 CIFAR-10 images, LeNet, 5 epochs",
    "cifar10_ldrlpublished": "2,000 CIFAR-10 images, LeNet, 5 epochs",
    "cifar10_ldrl": "10,000 CIFAR-10 images, LeNet, 6 epochs",
    "cifar10_gpu/simplevgg": "45,000 CIFAR-10 images, SimpleVGG, 20 epochs",
    "cifar10_gpu/lenet": "45,000 CIFAR-10 images, LeNet, 20 epochs",
    "target_propagation": "7,200 MNIST digits, MLP, 5 epochs",
}
#: Rows of rules that have changed since; `docs/results/README.md` says how.
OUTDATED = {
    (table, name)
    for table in ("digits", "digits_ldrlpublished", "cifar10", "target_propagation")
    for name in ("ldrl", "parallelldrl")
}
#: What a row's name does not say.
NOTES = {(f"cifar10_gpu/{network}", "ldrl"): "with `beta` 0.5, on a GPU" for network in ("simplevgg", "lenet")}
#: Algorithms by how tables name them: by their methods, and in one by the names of its files.
ALGORITHMS = {title: name for name, title in METHODS.items()} | {
    title.lower().replace(" ", "-"): name for name, title in METHODS.items()
}
COLUMNS = ("test accuracy, %", "angle to BP, °", "time per batch, x BP")


def read_table(name: str) -> dict[str, dict[str, str]]:
    """Return the rows of the tables of a comparison by algorithm, as in lightning_configs/, each by column."""
    rows: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for line in (DOCS / "results" / name / "table.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = []
        elif not head:
            head = cells
        elif not cells[0].startswith("-"):
            rows.setdefault(ALGORITHMS.get(cells[0], cells[0]), {}).update(zip(head, cells, strict=True))
    return rows


def figures(names: list[str]) -> str:
    """Make the table of a page.

    Args:
        names: of the rows that belong to the page.

    Returns:
        The table in markdown; a sentence where there are no figures yet.
    """
    found = []
    for table, data in TABLES.items():
        rows = read_table(table)
        for name in names:
            if name in rows and (table, name) not in OUTDATED:
                notes = [f"`{name}`", NOTES.get((table, name), ""), _runs(rows[name])]
                note = ", ".join(filter(None, notes))
                cells = [rows[name][column] for column in COLUMNS]
                before = rows["backprop"][COLUMNS[0]]
                found.append(f"| [{data}](../results/{table}/table.md) | {note} | {before} | {' | '.join(cells)} |")
    if not found:
        return "There is no comparison with it yet: [results](../results/README.md).\n"
    head = ["data and network", "row", "BP's test accuracy, %", *COLUMNS]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *found]) + "\n"


def _runs(row: dict[str, str]) -> str:
    """Say which runs the means leave out."""
    return row["runs"] if "of" in row["runs"] else ""


def fill(page: str) -> str:
    """Return a page with its figures as the tables have them."""
    return MARKS.sub(lambda found: f"{found[1]}\n{figures(found[2].split())}\n{found[3]}", page)


if __name__ == "__main__":
    for path in sorted((DOCS / "algorithms").glob("*.md")):
        path.write_text(fill(path.read_text()))
