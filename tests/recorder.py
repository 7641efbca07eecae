"""A graph that does on the CPU what a CUDA graph does on a GPU, to test graphs.py without one."""

import torch
from conftest import DEVICE
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from whisperkv import graphs
from whisperkv.graphs import CudaGraph


class Refusal(RuntimeError):
    """What no capture allows: the host would have to wait for the device, or the device for the host."""


class Recorder(TorchDispatchMode):
    """Writes down every op with the tensors that it was given and those that it gave."""

    REFUSED = (
        "_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim",
        "lift_fresh", "allclose",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        masks = name.startswith("index") and any(t.dtype == torch.bool for t in tensors(args[1:2]))
        if name in self.REFUSED or masks:
            raise Refusal(f"{op} while a graph is captured")
        output = op(*args, **kwargs)
        self.calls.append((op, args, kwargs, output))
        return output


class NoReading(TorchFunctionMode):
    """The same for what is no op."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__"):
            raise Refusal(f"{function.__name__} while a graph is captured")
        return function(*args, **(kwargs or {}))


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class RecordedGraph:
    """A CUDA graph has no Python and fixed addresses. So does this: the ops of a call run again on the very same
    tensors, and what comes out is written over what came out."""

    def __init__(self, call, undo, device, workspace):
        call()
        undo()
        with Recorder() as recorder, NoReading():
            call()
        self.calls = recorder.calls

    @staticmethod
    def stream(device):
        return 0

    @staticmethod
    def workspace(device):
        return None

    @torch.inference_mode()  # in which tensors of either mode may be written to
    def replay(self):
        for op, args, kwargs, output in self.calls:
            for old, new in zip(tensors(output), tensors(op(*args, **kwargs))):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


def listed(monkeypatch):
    """The kind of graph that tests are about, with lists of those made and replayed."""

    class Listed(RecordedGraph if DEVICE == "cpu" else CudaGraph):
        made, replays = [], []

        def __init__(self, *args):
            super().__init__(*args)
            self.made.append(self)

        def replay(self):
            super().replay()
            self.replays.append(self)

    monkeypatch.setitem(graphs.GRAPHS, DEVICE, Listed)
    return Listed
