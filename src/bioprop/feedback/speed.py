"""Choices that change how fast feedback training is, not what it computes."""

from dataclasses import dataclass
from typing import Literal

#: What several processes share of feedback training, see `Speed`.
Sharing = Literal["gradients", "weights", "stages"]


@dataclass(frozen=True)
class Speed:
    """The way in which feedback gradients are computed.

    Args:
        closed_form: by closed forms, for the kinds of stages that have them; false: by plain autograd
            everywhere but in the layers of residual stages.
        bfloat16: compute convolutions and matrix products of feedback training in bfloat16, out of float32 weights
            and into float32 gradients. Angles move by some tenths of a degree. So does ``--trainer.precision
            bf16-mixed``, which computes the products of forward passes, targets and updates in it, too.
        cuda_graph: on a GPU, record a step once and replay it, without launching every kernel again; where that is
            impossible it runs one by one.
        processes: with several of them, how they share feedback training. ``gradients``: each has its images, and
            gradients are averaged in every iteration, so that all is as with one process. ``weights``: each trains on
            its images alone, and the weights are averaged once a batch, which saves exchanges and is another method:
            the mean of several short courses on fewer images. ``stages``: each trains some of the stages on the
            images of all (Ernoult et al., 2022, on two GPUs), with the result of one process bit for bit; the forward
            phase is then repeated in every process.
    """

    closed_form: bool = True
    bfloat16: bool = False
    cuda_graph: bool = True
    processes: Sharing = "gradients"


DEFAULT_SPEED = Speed()
