"""Forward activations and the activations of the feedback path that belong to them.

The feedback operator of a stage ``y = rho(a)`` passes ``y`` through an activation ``phi`` before its weights.

- ``paper`` (Ernoult et al., 2022): ``phi = rho``, the forward activation once more.
- ``exact`` (ours): the ``phi`` whose slope at the stage's output is the forward slope at its input,
  ``phi'(rho(a)) = rho'(a)``. Symmetric weights then give ``J_G = J_F^T`` exactly.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.errors import UserError

ActivationName = Literal["elu", "relu", "tanh", "leaky_relu", "identity"]
MirrorName = Literal["paper", "exact"]


class Activation(NamedTuple):
    """A forward activation and the feedback activation that belongs to it, all without a graph of their own.

    Attributes:
        rho: the forward activation.
        phi: the feedback activation of a stage's output ``y = rho(a)``.
        slope: the derivative of ``phi``, never above 1; for ``exact`` it is ``rho'(a)`` as a function of ``y``.
    """

    rho: Callable[[Tensor], Tensor]
    phi: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]

    @property
    def is_linear(self) -> bool:
        """Return whether ``phi`` is the identity."""
        return self.phi is identity


#: Of an output stage. It hands back its argument.
identity = torch.positive


def elu_feedback(values: Tensor) -> Tensor:
    """``y`` above 0, ``y + y^2/2`` on [-1, 0], constant -1/2 below ELU's range, where noise and targets do lead.

    ELU (alpha 1) is ``exp(a) - 1`` below 0, so its slope there is ``exp(a) = y + 1``, the slope of this function.
    """
    below = values.clamp(-1.0, 0.0)
    return values.clamp_min(0.0) + below + 0.5 * below.square()


def tanh_feedback(values: Tensor) -> Tensor:
    """``y - y^3/3`` on [-1, 1], constant beyond: tanh has the slope ``1 - y^2`` where its value is ``y``."""
    inside = values.clamp(-1.0, 1.0)
    return inside - inside.pow(3) / 3.0


#: With ``phi`` in its ``exact`` form; slopes at a kink are those of torch's own derivative.
#: ReLU and leaky ReLU are their own `phi` away from 0. A dead ReLU unit sits exactly on the kink, where a target may
#: push it up but not down: the transposed-Jacobian property then holds from one side only.
ACTIVATIONS: dict[str, Activation] = {
    "elu": Activation(F.elu, elu_feedback, lambda y: (y + 1.0).clamp_max_(1.0)),
    "relu": Activation(F.relu, F.relu, lambda y: (y > 0).to(y.dtype)),
    "tanh": Activation(torch.tanh, tanh_feedback, lambda y: 1.0 - y.square()),
    # in float64 `where` would round 0.01
    "leaky_relu": Activation(F.leaky_relu, F.leaky_relu, lambda y: torch.full_like(y, 0.01).masked_fill(y > 0, 1.0)),
    "identity": Activation(identity, identity, torch.ones_like),
}

#: Activations that map a whole range of values to one. They are their own `rho(rho(a)) = rho(a)`.
FLAT = (F.relu,)


def find_activation(name: str, mirror: MirrorName = "exact") -> Activation:
    """Return a forward activation with the feedback activation in the form of mirror asked for.

    Raises:
        UserError: if the activation or the form of mirror is not known.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} is not known: choose one of {', '.join(ACTIVATIONS)}")
    if mirror not in get_args(MirrorName):
        raise UserError(f"mirror {mirror!r} is not known: choose one of {', '.join(get_args(MirrorName))}")
    found = ACTIVATIONS[name]
    if mirror == "exact":
        return found
    # slopes take the output of the forward activation, which `paper` applies to y
    return Activation(found.rho, found.rho, lambda values: found.slope(found.rho(values)))
