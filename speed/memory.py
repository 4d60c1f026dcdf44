"""How much memory a step takes, measured: on a GPU by PyTorch, on a CPU by following every tensor that it makes.

Fake tensors (`FakeTensorMode`) are followed like real ones: they have sizes and lives, but no memory (speed/plan.py).
"""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(tree):
    "Of all tensors in it; a sparse one is made of others, which were seen when they were made."
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.layout == torch.strided]


class LiveBytes(TorchDispatchMode):
    "Follows the memory of tensors made inside; `peak` is the most there was at once."
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakValueDictionary()

    def free(self, nbytes): self.now -= nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata in given or storage._cdata in self.known: continue
            self.known[storage._cdata] = storage
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
