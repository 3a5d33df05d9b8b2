"""flashmoe.c from Python: the functions of ref_cpu/fmoe.h on arrays that are not copied.

    import numpy, flashmoe
    indices, scores, weights = flashmoe.topk(logits, K=8)
    y = flashmoe.expert(x, down, up, indices, weights)

An array is anything dense in C order that lies in the CPU's memory: a NumPy array, or what speaks DLPack or
__array_interface__, such as a PyTorch tensor. Values are float32 and indices int32; nothing is converted silently.
Results are new NumPy arrays (torch.from_numpy shares their memory). NumPy has no bfloat16: here it is stored as uint16,
see to_bf16 and from_bf16. Names, shapes and rules are those of fmoe.h; a call that fails raises Error with its message.

These functions are the reference, which accumulates in double. flashmoe.cpu has the fast ones, flashmoe.cuda the CUDA
kernels, on PyTorch tensors; only that one needs PyTorch. `make lib` builds the library; FLASHMOE_LIB names another
folder to look in.
"""

from .library import Dtype, Error, Status, Write, version, view
from .reference import *
from . import cpu
