"""How much memory a step takes, measured: on a GPU by PyTorch, on a CPU by following every tensor that it makes."""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    "Follows the memory of tensors made inside; `peak` is the most there was at once."
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakValueDictionary()

    def free(self, nbytes): self.now -= nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for storage in [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]:
            if storage.data_ptr() in given or storage.data_ptr() in self.known: continue
            self.known[storage.data_ptr()] = storage
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def peak_memory(step, device):
    "Bytes that a step has at once at the most, beyond what there was before. It must leave no gradients behind."
    if device.type != "cuda":
        with LiveBytes() as live: step()
        return live.peak
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before
