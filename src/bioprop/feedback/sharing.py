"""The sharing of feedback training among several processes."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bioprop.distributed import from_process, mean_over_processes, process_count
from bioprop.feedback.losses import FeedbackGradient
from bioprop.networks.stages import StagePass


def average_gradients(gradients: Mapping[str, FeedbackGradient]) -> dict[str, FeedbackGradient]:
    """Average feedback gradients, losses and curvatures over all processes, in one exchange.

    Args:
        gradients: by name of stage, the same stages in every process.
    """
    if process_count() == 1:
        return dict(gradients)
    averaged = iter(mean_over_processes([tensor for each in gradients.values() for tensor in _tensors(each)]))
    return {name: _rebuild(gradient, averaged) for name, gradient in gradients.items()}


def _tensors(gradient: FeedbackGradient) -> list[Tensor]:
    return [gradient.loss, *gradient.parameters.values(), *(gradient.curvature or {}).values()]


def _rebuild(gradient: FeedbackGradient, values: Iterable[Tensor]) -> FeedbackGradient:
    """Put values in the places of `_tensors`."""
    values = iter(values)
    loss = next(values)
    parameters = {name: next(values) for name in gradient.parameters}
    curvature = None if gradient.curvature is None else {name: next(values) for name in gradient.curvature}
    return FeedbackGradient(parameters, loss, curvature)


def share_stages(
    passes: Mapping[str, StagePass], parameters: Mapping[str, int], iterations: Sequence[int]
) -> list[int]:
    """Divide stages among the processes, so that they finish at about the same time.

    The largest goes first, to the process with the least work so far: at most 4/3 of the time of the best division
    (Graham, 1969). Work is counted as iterations times multiplications of a pass, which every process counts alike.

    Args:
        passes: the clean pass of each stage, by name.
        parameters: number of its weights.
        iterations: a batch.

    Returns:
        The rank of the process that trains each stage.
    """
    work = []
    for (name, clean), count in zip(passes.items(), iterations, strict=True):
        values = clean.output if clean.affine is None else clean.affine
        work.append(count * parameters[name] * values[0, 0].numel())
    load, owners = [0] * process_count(), [0] * len(work)
    for index in sorted(range(len(work)), key=lambda each: -work[each]):
        owners[index] = load.index(min(load))
        load[owners[index]] += work[index]
    return owners


@torch.no_grad()
def average_weights(feedback: nn.Module, optimizer: torch.optim.Optimizer | None, losses: dict[str, Tensor]) -> None:
    """Average feedback weights, their momentum and the losses over all processes, in place and in one exchange."""
    tensors = [*_state(feedback, optimizer), *losses.values()]
    for tensor, mean in zip(tensors, mean_over_processes(tensors), strict=True):
        tensor.copy_(mean)


@torch.no_grad()
def hand_out_stages(
    feedback: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer | None,
    losses: Mapping[str, Tensor],
    owners: Mapping[str, int],
) -> dict[str, Tensor]:
    """Give every process the feedback weights, momentum and losses that each has trained, in one exchange a process.

    Args:
        feedback: the feedback operators by name of stage; overwritten in place where another process trains them.
        optimizer: of the feedback weights, whose momentum is sent along.
        losses: of the stages that this process has trained.
        owners: rank of the process that trains each stage, for all that are trained.

    Returns:
        The losses of all stages, in the order of ``owners``.
    """
    everything = {}
    for name in owners:
        state = _state(feedback[name], optimizer)
        everything[name] = [*state, losses.get(name, state[0].new_zeros(()))]
    for source in sorted(set(owners.values())):
        own = [tensor for name, owner in owners.items() if owner == source for tensor in everything[name]]
        for tensor, sent in zip(own, from_process(source, own), strict=True):
            tensor.copy_(sent)
    return {name: tensors[-1] for name, tensors in everything.items()}


def _state(feedback: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Weights and momentum; a process that has not stepped a weight yet has no momentum of it."""
    tensors = []
    for parameter in feedback.parameters():
        tensors.append(parameter.data)
        if optimizer is not None and optimizer.param_groups[0]["momentum"]:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            tensors.append(state["momentum_buffer"])
    return tensors
