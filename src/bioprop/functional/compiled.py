"""Point-wise work that a compiler turns into one pass: noise, and what lies between the products of a closed form.

Nothing here is compiled before it is first used; `compiled` asks for it.
"""

import math
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from bioprop.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

#: Multipliers of a mixing function of 32 bits without weak bits (Wellons, 2018: "lowbias32"), as signed integers.
MIX = (0x7FEB352D, 0x846CA68B - 2**32)


def refuse_without_compiler() -> None:
    """Check that there is a C++ compiler.

    Raises:
        UserError: if there is none.
    """
    # torch's own choice; the variable may hold a launcher before the compiler's name
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(name.split()[0]):
        raise UserError(
            f"speed.compile needs a C++ compiler, and {name} is not found: install one, name it in the environment "
            "variable CXX, or leave speed.compile out"
        )


def compiled(function: Callable[P, R], dynamic: bool = False) -> Callable[P, R]:
    """Compile a function, apart from all other compilations of it.

    Args:
        function: of tensors and constants.
        dynamic: compile once for all shapes.

    Returns:
        The compiled function; its first call raises a UserError where the compiler fails.
    """
    source = cast(FunctionType, function)
    # torch counts recompilations by code object and gives up after a few: every stage has a copy of its own
    twin = FunctionType(source.__code__.replace(), source.__globals__, source.__name__, source.__defaults__)
    fast = cast(Callable[P, R], torch.compile(twin, dynamic=dynamic))

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return fast(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())  # what follows is advice on debugging
            raise UserError(f"speed.compile: the compiler failed ({reason}): leave speed.compile out") from error

    return run


def counter_noise(keys: Tensor, sigma: Tensor, count: int) -> Tensor:
    """``count`` numbers of ``N(0, sigma^2)``, a function of the keys and of each number's place alone.

    A counter goes through a keyed mixing function three times; two of the results make a pair of normal numbers (Box &
    Muller, 1958). Several keys of 32 bits, since streams of a single one collide within one run; the last turns the
    pairs only, so the first two must differ between streams.

    Args:
        keys: three int32.
        sigma: standard deviation, a float32 scalar.
        count: how many numbers, even.

    Returns:
        float32 ``[count]``.
    """
    counter = torch.arange(count // 2, dtype=torch.int32, device=keys.device)
    once = _mix(counter ^ keys[0])
    first = _mix(once + keys[1])
    second = _mix(first ^ keys[2])
    # |first| / 2^31 in (0, 1), with small steps near 0, where the tails come from
    radius = torch.sqrt(-2.0 * torch.log((first.to(torch.float32) * 2.0**-31).abs().clamp(2.0**-32, 1.0))) * sigma
    angle = second.to(torch.float32) * (math.pi * 2.0**-31)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])


def _mix(bits: Tensor) -> Tensor:
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * MIX[0]
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * MIX[1]
    return bits ^ ((bits >> 16) & 0xFFFF)


@cache
def compiled_noise() -> Callable[[Tensor, Tensor, int], Tensor]:
    """`counter_noise`, compiled once for all sizes."""
    return compiled(counter_noise, dynamic=True)
