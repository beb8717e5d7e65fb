"""Normalised direct feedback alignment: the direction of the output error reaches every stage, not its size."""

import torch.nn.functional as F
from torch import Tensor

from bioprop.algorithms.direct_feedback_alignment import DirectFeedbackAlignment


class NormalizedDFA(DirectFeedbackAlignment):
    """Direct feedback alignment by output errors of unit length: ``(e / |e|) B^n`` at hidden stage n, sample by sample.

    Ours, between `DirectFeedbackAlignment` and `DirectRandomTargetProjection`: a sample that is classified almost right
    still moves hidden stages as far as any other. The last stage has its own error. The length is that of the error of
    each sample, whatever the batch, so that hidden steps do not fade as the loss does: let the learning rate fall.
    """

    recordable = True

    def projected(self, error: Tensor, labels: Tensor) -> Tensor:
        """Return ``e / |e| / batch``, ``[batch, classes]``."""
        return F.normalize(error, dim=1) / len(error)
