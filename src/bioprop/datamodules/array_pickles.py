"""Reading pickled arrays of strangers, without running what else a pickle can say."""

import pickle
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import IO, Any

import numpy as np

from bioprop.errors import UserError


class _Dtype:
    """Stands in for `numpy.dtype`, whose own way back from a pickle believes whatever the pickle says of memory."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if not re.fullmatch("[iuf][1248]|b1", text):
            raise _Refused(f"numpy.dtype({text!r})")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in (">", b">"):  # else little-endian, or of one byte
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Stands in for `numpy.ndarray`: made empty, then given shape, type and bytes."""

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _from_buffer(raw, dtype, shape, "F" if fortran else "C").array


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    result = _Array()
    result.array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return result


def _scalar(dtype: _Dtype, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype.dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes bytes as in an old protocol: `_codecs.encode`, of the one encoding that it uses."""
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode(..., {encoding!r})")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
for _core in ("core", "_core"):  # of numpy 1 and numpy 2
    ALLOWED[f"numpy.{_core}.multiarray", "_reconstruct"] = _reconstruct
    ALLOWED[f"numpy.{_core}.multiarray", "scalar"] = _scalar
    ALLOWED[f"numpy.{_core}.numeric", "_frombuffer"] = _from_buffer


class _Refused(pickle.UnpicklingError):
    """The pickle names something that is not allowed."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def load_arrays(file: IO[bytes], path: PurePath) -> dict[str, Any]:
    """Reads a pickled dictionary of numpy arrays, lists, numbers and strings, written by Python 2 or 3.

    A pickle is a program. This one is run by an interpreter that knows plain containers and stand-ins for what numpy
    builds an array with; at any other name it stops before that is looked up, so nothing is imported or called.

    Args:
        file: The pickle, at its beginning.
        path: Its name, for messages.

    Returns:
        The dictionary, its keys as text; the arrays are read-only.

    Raises:
        UserError: The pickle asks for anything else, by the name of it; is damaged; or is no dictionary.
    """
    try:
        content = _ArrayUnpickler(file, encoding="bytes").load()
    except _Refused as error:
        raise UserError(
            f"'{path}' asks for {error}, which no file of images needs: nothing was run and the file is not read; get "
            "it anew from where it is published."
        ) from error
    # a cut or garbled pickle raises almost anything
    except Exception as error:
        raise UserError(f"'{path}' is not a readable pickle ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"'{path}' holds a {type(content).__name__}, but a dictionary of images and labels is expected: is it "
            "another file of the same name?"
        )
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): getattr(value, "array", value)
        for key, value in content.items()
    }
