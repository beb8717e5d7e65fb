"""The algorithms, one a file; each is a LightningModule that trains any network of `bioprop.networks`."""

from bioprop.algorithms.analytic_feedback import AnalyticFeedback
from bioprop.algorithms.backprop import Backprop
from bioprop.algorithms.base import Algorithm
from bioprop.algorithms.ddtp_control import DDTPControl
from bioprop.algorithms.ddtp_linear import DDTPLinear
from bioprop.algorithms.ddtp_rhl import DDTPRHL
from bioprop.algorithms.difference_reconstruction import DifferenceReconstruction
from bioprop.algorithms.direct_feedback_alignment import DirectFeedbackAlignment
from bioprop.algorithms.direct_kolen_pollack import DirectKolenPollack
from bioprop.algorithms.direct_random_target_projection import DirectRandomTargetProjection
from bioprop.algorithms.dtp import DTP
from bioprop.algorithms.dtp_drl import DTPDRL
from bioprop.algorithms.feedback_alignment import FeedbackAlignment
from bioprop.algorithms.fixed_weight_dtp import FixedWeightDTP
from bioprop.algorithms.gait_prop import GAITProp
from bioprop.algorithms.ldrl import LDRL
from bioprop.algorithms.normalized_dfa import NormalizedDFA
from bioprop.algorithms.parallel_ldrl import ParallelLDRL
from bioprop.algorithms.pepita import PEPITA
from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.algorithms.target_propagation import TargetPropagation

__all__ = [
    "DDTPRHL",
    "DTP",
    "DTPDRL",
    "LDRL",
    "PEPITA",
    "Algorithm",
    "AnalyticFeedback",
    "Backprop",
    "DDTPControl",
    "DDTPLinear",
    "DifferenceReconstruction",
    "DirectFeedbackAlignment",
    "DirectKolenPollack",
    "DirectRandomTargetProjection",
    "FeedbackAlignment",
    "FixedWeightDTP",
    "GAITProp",
    "NormalizedDFA",
    "ParallelLDRL",
    "TargetAlgorithm",
    "TargetPropagation",
]
