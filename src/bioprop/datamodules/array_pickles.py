"""Reading pickled arrays of strangers, without running what else a pickle can say."""

import pickle
import re
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from bioprop.errors import UserError


def _refused(name: str) -> UserError:
    return UserError(f"it asks for {name}, which no file of images needs: nothing was run and the file is not read")


class _Dtype:
    """Stands in for `numpy.dtype`, whose own way back from a pickle believes whatever the pickle says of memory."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        if not re.fullmatch("[iuf][1248]|b1", self.code):
            raise _refused(f"numpy.dtype({self.code!r})")
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] in (">", b">") else "<"  # the latter also of one byte


class _Array:
    """Stands in for `numpy.ndarray`: made empty, then given shape, type and bytes."""

    def __init__(self, *_: object) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _from_buffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...] = (), order: Any = "C") -> np.ndarray:
    return np.frombuffer(raw, dtype.order + dtype.code).reshape(shape, order=order)


ALLOWED: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    # bytes in an old protocol of Python 3, which are written in this encoding alone
    "_codecs.encode": lambda text, encoding: text.encode({"latin1": "latin1"}[encoding]),
}
for _core in ("numpy.core", "numpy._core"):  # of numpy 1 and numpy 2
    ALLOWED[f"{_core}.multiarray._reconstruct"] = _Array
    ALLOWED[f"{_core}.multiarray.scalar"] = lambda dtype, raw: _from_buffer(raw, dtype)[()]
    ALLOWED[f"{_core}.numeric._frombuffer"] = _from_buffer


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if f"{module}.{name}" not in ALLOWED:
            raise _refused(f"{module}.{name}")
        return ALLOWED[f"{module}.{name}"]


def load_arrays(file: IO[bytes], path: str) -> dict[str, Any]:
    """Reads a pickled dictionary of numpy arrays, lists, numbers and strings, written by Python 2 or 3.

    A pickle is a program. This one is run by an interpreter that knows plain containers and stand-ins for what numpy
    builds an array with; at any other name it stops before that is looked up, so nothing is imported or called.
    The keys are returned as text; the arrays are read-only. `path` names the file in messages.

    Raises:
        UserError: The pickle asks for anything else, whose name is given; is damaged; or is no dictionary.
    """
    try:
        content = _ArrayUnpickler(file, encoding="bytes").load()
        texts = {key.decode("latin1") if isinstance(key, bytes) else str(key): each for key, each in content.items()}
    except Exception as error:  # a cut or garbled pickle raises almost anything
        raise UserError(f"'{path}' is no pickled dictionary of arrays ({error}): download it again.") from error
    return {key: getattr(value, "array", value) for key, value in texts.items()}
