"""Lightning's precisions that an algorithm trains in, and the reasons to refuse the others."""

from collections.abc import Sequence

from bioprop.errors import UserError

#: Names that Lightning takes for others.
ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
HALF = "differences between nearly equal activations, and small gradients, vanish below float16's range"
#: Why no algorithm trains in them.
REASONS = {
    "16-mixed": HALF,
    "16-true": HALF,
    "bf16-true": "a weight in bfloat16 loses every step below 1/512 of its size",
    "transformer-engine": "its layers are not those that have feedback weights",
    "transformer-engine-float16": "its layers are not those that have feedback weights",
}


def check_precision(precision: str | int | None, algorithm: str, supported: Sequence[str], reason: str) -> None:
    """Refuse a precision in which the arithmetic of an algorithm would lose its meaning.

    Args:
        precision: as given to Lightning's Trainer; None for its default, 32-true.
        algorithm: name of the algorithm's class.
        supported: the precisions it trains in.
        reason: why it does not in one that others do.

    Raises:
        UserError: naming the precision, the reason, and those that work.
    """
    name = ALIASES.get(str(precision), str(precision))
    if precision is not None and name not in supported:
        raise UserError(
            f"precision {name} is not supported by {algorithm}, since {REASONS.get(name, reason)}: choose one of "
            f"{', '.join(supported)}"
        )
