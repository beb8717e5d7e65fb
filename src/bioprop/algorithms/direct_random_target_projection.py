"""Direct random target projection: the label reaches every stage at once."""

import torch.nn.functional as F
from torch import Tensor

from bioprop.algorithms.direct_feedback_alignment import DirectFeedbackAlignment


class DirectRandomTargetProjection(DirectFeedbackAlignment):
    """Fixed random matrices from the label straight to every hidden stage (Frenkel, Lefebvre & Bol, 2021).

    The error of hidden stage n is ``-onehot(y) B^n``, of which the stage forms gradients as in direct feedback
    alignment: the part of the output error that is known before the forward pass has reached the output. The last stage
    has its own error. Nothing makes a hidden error vanish, so that hidden stages learn as long as their activations do
    not saturate: choose ``tanh``; under an activation without bounds, such as ELU, the weights may grow without end.

    The sign is that of the output error; as the matrices are drawn symmetrically around zero, the other one is the same
    rule. The matrices, one row a class, are those of `DirectFeedbackAlignment`: normal, of rows of about unit length,
    where the authors draw them uniformly.
    """

    recordable = True

    def projected(self, error: Tensor, labels: Tensor) -> Tensor:
        """Return ``-onehot(y) / batch``, ``[batch, classes]``."""
        return F.one_hot(labels, error.shape[1]).to(error) / -len(labels)
