"""A GPU that is not there: tensors without contents that say they lie on one, and a note of all that would make the host wait."""

from __future__ import annotations

import collections
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
HERE, META = torch.device("cuda"), torch.device("meta")
DATA_SIZED = ("nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave")
"""Operators whose output is as large as the data says."""


class PretendedGpu:
    """Counts, by the line that asked, what would make the host wait."""

    def __init__(self):
        self.waits = collections.Counter()
        self.copies = 0
        """Copies to the device that the host need not wait for."""
        self.pinned = set()

    def wait(self, what):
        """Note one."""
        ours = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT) and "tests" not in f.filename]
        frames = [f for f in ours if ".venv" not in f.filename]
        self.waits[f"{what} at {Path(frames[-1].filename).name}: {frames[-1].line}" if frames else what] += 1

    @contextmanager
    def here(self):
        """In this thread, until the block ends."""
        with ExitStack() as stack:
            stack.enter_context(_Operators(self))
            stack.enter_context(_Names(self))
            yield self


class _Names(TorchFunctionMode):
    """Has the device called cuda on the way out, and meta on the way in."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.device.__get__:
            found = function(*args)
            return HERE if found == META else found
        if function == torch.Tensor.is_cuda.__get__:
            return args[0].is_meta
        if function is torch.device:
            return function(*args, **kwargs)
        if function is torch.autograd.backward:  # which would call backwards without this mode
            with self:
                return _backward(args[0], kwargs.get("grad_tensors"))
        args, kwargs = [_inwards(x) for x in args], {key: _inwards(x) for key, x in kwargs.items()}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            self.gpu.wait("a tensor of the host's numbers")
        if kwargs.get("pin_memory"):
            del kwargs["pin_memory"]
            made = function(*args, **kwargs)
            self.gpu.pinned.add(made.untyped_storage().data_ptr())
            return made
        return function(*args, **kwargs)


def _inwards(x):
    if isinstance(x, torch.device) and x.type == "cuda":
        return META
    return "meta" if isinstance(x, str) and x.startswith("cuda") else x


def _backward(outputs, gradients):
    given = [torch.ones_like(y) for y in outputs] if gradients is None else tree_leaves(gradients)
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(tuple(outputs), tuple(given), False, False, (), allow_unreachable=True, accumulate_grad=True)


class _Operators(TorchDispatchMode):
    """Sees every operator, those of the backward and inside of others too."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # devices by their real names
            return self._run(function, args, kwargs or {})

    def _run(self, function, args, kwargs):
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if x.device.type == "meta"]
        if name == "_local_scalar_dense" and there:
            self.gpu.wait("a number")
            return {torch.bool: False, torch.int64: 0}.get(args[0].dtype, 0.0)
        if name in DATA_SIZED and there:
            raise AssertionError(f"{function} on the device has the host wait")
        if (
            name in ("index", "index_put", "index_put_")
            and any(x is not None and x.dtype == torch.bool for x in args[1])
            and there
        ):
            raise AssertionError(f"{function} by a mask has the host wait")
        if name in ("_to_copy", "to") and kwargs.get("device") is not None and kwargs["device"].type != args[0].device.type:
            return self._move(args[0], kwargs)
        if name == "copy_" and args[0].device.type != args[1].device.type:
            if args[1].dim() > 0 or there[0] is args[1]:
                self._count(args[1] if there[0] is args[0] else args[0], kwargs.get("non_blocking") or args[2:] == (True,))
            return args[0]
        if name.startswith("_fused_adam"):
            return None
        return function(*args, **kwargs)

    def _move(self, x, kwargs):
        """To the device, or to the host, where the numbers are zeros."""
        to_host, dtype = kwargs["device"].type == "cpu", kwargs.get("dtype") or x.dtype
        if to_host:
            if not kwargs.get("non_blocking"):
                self.gpu.wait("a copy to the host")
            return torch.zeros(x.shape, dtype=dtype)
        self._count(x, kwargs.get("non_blocking"))
        return torch.empty(x.shape, dtype=dtype, device="meta")

    def _count(self, host, non_blocking):
        if non_blocking and host.untyped_storage().data_ptr() in self.gpu.pinned:
            self.gpu.copies += 1
        else:
            self.gpu.wait("a copy from pageable memory" if non_blocking else "a copy that the host waits for")
