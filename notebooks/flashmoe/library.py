"""The shared library, its calls, and how arrays are handed to it."""

import ctypes
import ctypes.util
import enum
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Status(enum.IntEnum):
    OK, NULL_POINTER, BAD_SIZE, BAD_TOPK, OVERFLOW, BATCH_OF_ONE, BAD_INDEX = range(7)
    UNSUPPORTED, OUT_OF_MEMORY, BAD_WORKSPACE, IO, BAD_FILE, CUDA = range(7, 13)


class Dtype(enum.IntEnum):
    F32, F16, BF16, I32, I64 = range(5)


class Write(enum.IntEnum):
    OVERWRITE, ACCUMULATE = range(2)


class Error(Exception):
    """What a function of the library returned, with its message: which argument, its value and the limit."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


# ---- The library -----------------------------------------------------------------------------------------------------


def load_library(name):
    """The shared library from FLASHMOE_LIB, from build/lib, or from where the system keeps its libraries."""
    folder = os.environ.get("FLASHMOE_LIB", Path(__file__).resolve().parents[2] / "build/lib")
    path = Path(folder).resolve() / f"lib{name}.so"
    if not path.exists():
        path = ctypes.util.find_library(name)
    if not path:
        raise ImportError(f"no lib{name}.so in {folder}: run make lib, or set FLASHMOE_LIB to its folder")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


library = load_library("flashmoe")


def returns(result, *names):
    for name in names:
        getattr(library, "fmoe_" + name).restype = result


returns(ctypes.c_char_p, "version", "error_message", "dtype_name", "file_metadata")
returns(ctypes.c_int64, "num_keys", "compare_indices", "file_count")
returns(ctypes.c_double, "relative_error", "error_limit", "silu", "silu_derivative")
returns(None, "file_close", "weights_free", "to_f32", "from_f32")

version = library.fmoe_version().decode()


def argument(value):
    """How C wants it. Every size in the headers is an int64_t (a size_t takes the same room)."""
    if value is None or isinstance(value, Array):
        return ctypes.c_void_p(value and value.pointer)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, enum.IntEnum):
        return ctypes.c_int(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return value  # made by ctypes


def call(name, *values, back_end=None):
    """Calls fmoe_<name>, which returns a status."""
    status = getattr(back_end or library, "fmoe_" + name)(*map(argument, values))
    if status != Status.OK:
        raise Error(Status(status), library.fmoe_error_message().decode())


def value_of(name, *values):
    """Calls fmoe_<name>, which cannot fail, for what it returns."""
    return getattr(library, "fmoe_" + name)(*map(argument, values))


# ---- Arrays ----------------------------------------------------------------------------------------------------------


class Array(NamedTuple):
    """Where an array lies. owner keeps the memory alive as long as this is."""

    pointer: int
    dtype: Dtype
    shape: tuple
    on_cpu: bool
    owner: object


class _DLTensor(ctypes.Structure):
    """The head of a DLManagedTensor: dmlc/dlpack's header dlpack.h, version 0.x."""

    _fields_ = [
        ("data", ctypes.c_uint64),
        ("device", ctypes.c_int32 * 2),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]


_NUMPY_TYPES = {"float32": Dtype.F32, "float16": Dtype.F16, "bfloat16": Dtype.BF16, "uint16": Dtype.BF16}
_NUMPY_TYPES |= {"int32": Dtype.I32, "int64": Dtype.I64}
_DLPACK_TYPES = {(2, 32): Dtype.F32, (2, 16): Dtype.F16, (4, 16): Dtype.BF16, (0, 32): Dtype.I32, (0, 64): Dtype.I64}
_CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost


def view(array, name="array"):
    """The array as the library sees it, without a copy. TypeError or ValueError say why that cannot be."""
    if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack__"):
        return _view_dlpack(array, name)
    if not isinstance(array, np.ndarray) and not hasattr(array, "__array_interface__"):
        raise TypeError(f"{name} is a {type(array).__name__}, not an array")
    array = np.asarray(array)
    if array.dtype.name not in _NUMPY_TYPES:
        raise TypeError(f"{name} is {array.dtype.name}: none of {', '.join(_NUMPY_TYPES)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not dense in C order: pass numpy.ascontiguousarray({name})")
    return Array(array.ctypes.data, _NUMPY_TYPES[array.dtype.name], array.shape, True, array)


def _view_dlpack(array, name):
    capsule = array.__dlpack__()
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = ctypes.cast(pointer_of(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
    shape = tuple(tensor.shape[: tensor.rank])
    kind = _DLPACK_TYPES.get((tensor.code, tensor.bits))
    if kind is None or tensor.lanes != 1:
        raise TypeError(f"{name} has a type that is none of {', '.join(d.name.lower() for d in Dtype)}")
    dense = 1
    for size, stride in reversed(list(zip(shape, tensor.strides[: tensor.rank] if tensor.strides else ()))):
        if stride != dense and size > 1 and 0 not in shape:
            raise ValueError(f"{name} is not dense in C order: pass {name}.contiguous()")
        dense *= size
    return Array((tensor.data or 0) + tensor.offset, kind, shape, tensor.device[0] in _CPU_DEVICES, capsule)


class Shapes(dict):
    """Checks arrays against shapes such as ("T", "d"). A letter gets its size from the first array that has it."""

    def floats(self, name, array, *shape):
        return self.check(name, array, Dtype.F32, shape)

    def optional(self, name, array, *shape):
        return None if array is None else self.floats(name, array, *shape)

    def buffer(self, name, array, *shape):
        """An array that a call may write to."""
        v = self.floats(name, array, *shape)
        if isinstance(v.owner, np.ndarray) and not v.owner.flags.writeable:
            raise ValueError(f"{name} is read-only")
        return v

    def integers(self, name, array, *shape):
        return self.check(name, array, Dtype.I32, shape)

    def check(self, name, array, dtype, shape):
        v = view(array, name)
        if v.dtype != dtype:
            raise TypeError(f"{name} is {v.dtype.name.lower()}, the library takes {dtype.name.lower()}")
        self.place(name, array, v.on_cpu)
        sizes = [self.setdefault(s, have) if isinstance(s, str) else s for s, have in zip(shape, v.shape)]
        if list(v.shape) != sizes or len(shape) != len(v.shape):
            wanted = ", ".join(f"{s} = {self[s]}" if s in self else str(s) for s in shape)
            raise ValueError(f"{name} has the shape {list(v.shape)}, not [{wanted}]")
        return v

    def place(self, name, array, on_cpu):
        if not on_cpu:
            raise TypeError(f"{name} does not lie in the CPU's memory")


def new(*shape, dtype=np.float32):
    return np.empty(shape, dtype)


