"""The largest tensor that an operation ever holds."""

import torch


class Biggest(torch.utils._python_dispatch.TorchDispatchMode):
    """While it is entered: the bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return out
