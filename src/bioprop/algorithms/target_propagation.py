"""TP: target propagation, without the difference correction."""

from typing import cast

from torch import Tensor

from bioprop.algorithms.dtp import DTP
from bioprop.networks.mirrors import Mirror
from bioprop.networks.stages import StagePass


class TargetPropagation(DTP):
    """Target propagation (Bengio, 2014; named so and compared by Lee, Zhang, Fischer & Bengio, ECML 2015).

    Feedback is trained as in `DTP`, to reconstruct. Targets are what it makes of the target above,
    ``t^{n-1} = G^n(t^n)``: if ``G^n`` is the inverse of ``F^n``, then ``F^n(t^{n-1}) = t^n``. If it is not, the target
    carries the whole error of reconstruction, which ``beta`` does not scale: below the output, updates in units of the
    BP gradient grow as ``1 / beta``, and training needs feedback that reconstructs well.

    The arguments are those of `DTP`.
    """

    def difference_below(self, name: str, clean: StagePass, difference: Tensor) -> Tensor:
        """Return ``t^{n-1} - s^{n-1} = G^n(t^n) - s^{n-1}``."""
        mirror = cast(Mirror, self.feedback[name])
        target: Tensor = mirror(clean.output.detach() + difference, clean.switches)
        return target - clean.inputs
