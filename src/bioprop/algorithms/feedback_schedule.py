"""Which epochs train feedback weights alone."""

import logging
from typing import NamedTuple

logger = logging.getLogger(__name__)


class FeedbackSchedule(NamedTuple):
    """First P epochs of feedback alone, then again and again one epoch that trains both and E of feedback alone.

    All are epochs of the trainer, with validation and checkpoints: F epochs that train both need
    ``max_epochs = P + F (1 + E)``.

    Attributes:
        pretraining_epochs: P.
        extra_epochs: E.
    """

    pretraining_epochs: int
    extra_epochs: int

    def trains_forward(self, epoch: int) -> bool:
        """Return whether an epoch, counted from 0, trains forward weights; every one trains feedback weights."""
        since = epoch - self.pretraining_epochs
        return since >= 0 and since % (1 + self.extra_epochs) == 0

    def warn_of_no_training(self, max_epochs: int | None) -> None:
        """Say so where no epoch of a run trains forward weights."""
        if max_epochs is not None and 0 <= max_epochs <= self.pretraining_epochs:
            logger.warning(
                "all %d epochs train feedback weights alone (feedback_pretraining_epochs is %d): raise max_epochs to "
                "train the network",
                max_epochs,
                self.pretraining_epochs,
            )
