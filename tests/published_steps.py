"""The same step in other units: from gradients that carry a factor ``beta``, as published, to those of BP."""

from typing import Any


def in_units_of_backprop(optimizer: str, settings: dict[str, Any], beta: float) -> dict[str, Any]:
    """The arguments under which an optimizer makes of gradients ``g`` the steps it published of ``beta g``.

    Args:
        optimizer: ``SGD``, ``Adam`` or ``AdamW``.
        settings: what is published; an ``eps`` that is not given is torch's.
        beta: what the published gradients carry.
    """
    # Adam does not mind the size of a gradient, but beside its eps
    changed = {"lr": settings["lr"] * beta} if optimizer == "SGD" else {"eps": settings.get("eps", 1e-8) / beta}
    if "weight_decay" in settings and optimizer != "AdamW":  # AdamW's is no part of the gradient
        changed["weight_decay"] = settings["weight_decay"] / beta
    return settings | changed
