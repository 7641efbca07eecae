"""Keys and values that nobody holds: made of the cache when somebody looks at them.

generate(return_dict_in_generate=True) takes a cache apart row by row, copies it and puts it together again. Done with
ordinary tensors, that turns a small cache back into floats, several times over. A View stays a View through all of it.
"""

import copy
import weakref

import torch
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import DynamicLayer

ROW, ROWS, STACKED = "row", "rows", "stacked"  # one row without a batch, several, and several before squeeze(1)


class View(torch.Tensor):
    """Keys (part 0) or values (part 1) of some rows of a layer, of the first so many tokens or frames:
    [rows, heads, tokens, head_dim].

    Its layer has heads, head_dim, dtype, device, batch_size, `views` (an Onlookers), and floats(part, rows, tokens),
    which makes the tensor. What a View shows does not change: before its layer loses it, the View takes it (`own`).
    """

    @staticmethod
    def __new__(cls, layer, part, rows, tokens, form=ROWS, device=None, own=None):
        lead = {ROW: (), ROWS: (len(rows),), STACKED: (len(rows), 1)}[form]
        shape = (*lead, layer.heads, tokens, layer.head_dim)
        device = device or layer.device
        view = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=device)
        view.layer, view.part, view.rows, view.tokens, view.form = layer, part, rows, tokens, form
        view.own = own
        if own is None:
            layer.views.add(view)
        return view

    def __repr__(self):
        return f"View({list(self.shape)}, {self.dtype}, {self.device})"

    def __reduce_ex__(self, protocol):
        return View, (self.layer, self.part, self.rows, self.tokens, self.form, self.device, self.own)

    def __deepcopy__(self, memo):
        return View(copy.deepcopy(self.layer, memo), *self.__reduce_ex__(2)[1][1:])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        stays = _STAYS_A_VIEW.get(function)
        view = stays(*args, **kwargs) if stays else None
        if view is not None:
            return view
        return function(*tree_map_only(View, View.floats, args), **tree_map_only(View, View.floats, kwargs))

    def floats(self):
        """The tensor that this is a view of."""
        rows = self.layer.floats(self.part, self.rows, self.tokens) if self.own is None else self.own
        shown = {ROW: lambda: rows[0], ROWS: lambda: rows, STACKED: lambda: rows[:, None]}[self.form]()
        return shown.to(self.device)

    def take(self):
        self.own = self.layer.floats(self.part, self.rows, self.tokens).clone()

    def but(self, **changed):
        """Another view of the same layer. One that has become a tensor of its own has none."""
        if self.own is None:
            same = dict(rows=self.rows, tokens=self.tokens, form=self.form, device=self.device)
            return View(self.layer, self.part, **{**same, **changed})

    def is_whole(self):
        """Whether this shows all rows of its layer, in their order."""
        rows, device = tuple(range(self.layer.batch_size)), torch.device(self.layer.device)
        return self.own is None and (self.form, self.rows, self.device) == (ROWS, rows, device)


class Onlookers:
    """The views that somebody still holds, of the layers of a cache: reordering one may move all."""

    def __init__(self):
        self._views = []

    def __reduce__(self):
        return Onlookers, ()  # a copy of the cache has none

    def add(self, view):
        self._views = [each for each in self._views if each() is not None] + [weakref.ref(view)]

    def dismiss(self):
        """Call before the layer loses or moves what it holds."""
        for each in self._views:
            view = each()
            if view is not None:
                view.take()
        self._views = []


# What transformers does with a cache that it takes apart: another view, or None if it takes more than that


def _select(view, dim, index):
    if (view.form, dim) == (ROWS, 0):
        return view.but(rows=(view.rows[index],), form=ROW)


def _unsqueeze(view, dim):
    if (view.form, dim) == (ROW, 0):
        return view.but(form=ROWS)


def _squeeze(view, dim):
    if (view.form, dim) == (STACKED, 1):
        return view.but(form=ROWS)


def _crop(view, dim=0, start=None, end=None, step=1):
    if (view.form, dim, start or 0, step) == (ROWS, 2, 0, 1):
        return view.but(tokens=len(range(view.tokens)[:end]))


def _same(view):
    return view.but()


def _move(view, *, device=None, dtype=None, **options):
    if device is not None and dtype in (None, view.dtype):
        return view.but(device=torch.device(device))


def _cat(tensors, dim=0):
    views = [tensor for tensor in tensors if isinstance(tensor, View)]
    if len(views) == 1 and all(tensor is views[0] or tensor.numel() == 0 for tensor in tensors):
        return views[0].but()


def _stack(tensors, dim=0):
    def where(view):
        return isinstance(view, View) and (view.layer, view.part, view.tokens, view.form, view.device)

    first = where(tensors[0])
    if first and dim == 0 and tensors[0].form == ROWS and all(where(tensor) == first for tensor in tensors):
        if all(len(view.rows) == 1 and view.own is None for view in tensors):
            return tensors[0].but(rows=tuple(view.rows[0] for view in tensors), form=STACKED)


_STAYS_A_VIEW = {
    torch.ops.aten.select.int: _select,
    torch.ops.aten.unsqueeze.default: _unsqueeze,
    torch.ops.aten.squeeze.dim: _squeeze,
    torch.ops.aten.slice.Tensor: _crop,
    torch.ops.aten.detach.default: _same,
    torch.ops.aten._to_copy.default: _move,
    torch.ops.aten.cat.default: _cat,
    torch.ops.aten.stack.default: _stack,
}


# What becomes of caches of views


def layers_behind(cache, kind):
    """The layers that a cache of views shows, with the number of tokens that are left of each; None if it does not show
    whole layers of that kind."""
    found = []
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not (isinstance(keys, View) and isinstance(values, View) and isinstance(keys.layer, kind)):
            return None
        if (keys.layer, keys.tokens, 0, 1) != (values.layer, values.tokens, keys.part, values.part):
            return None
        if not (keys.is_whole() and values.is_whole()):
            return None
        found.append((keys.layer, keys.tokens))
    return found or None


def plain_layer(layer):
    """A layer of transformers' own that holds what ours does."""
    plain = DynamicLayer()
    with torch.no_grad():  # as when they entered
        plain.update(layer.keys.floats(), layer.values.floats())
    return plain
