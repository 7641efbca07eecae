"""The matrices of a converted layer."""

import torch
from torch import nn
from torch.nn import functional

from .codes import Codes


class Factors(nn.Module):
    """From inputs to a token's latent and from it to keys and values: "separate" and "joint" latents.

    down       [width, hidden]: of inputs; of keys and values together, [width, 2 * dim], where a group shares them
    up_keys    [dim, keys] and up_values [dim, values], each orthonormal: of "separate" latents
    up         [2 * dim, width], orthonormal: of one latent for both; of a group's, [layers * 2 * dim, width]
    bias_keys  [dim], and bias_values: what is added to what was rebuilt
    """

    def __init__(self, latents, number, hidden, dim):
        super().__init__()
        self.dim, self.kind, self.keys, self.values = dim, latents.kind, latents.keys, latents.values
        inputs = 2 * dim if latents.is_shared else hidden
        self.down = nn.Parameter(torch.empty(latents.width, inputs))
        self.row = 2 * dim * latents.group.index(number) if latents.is_shared else 0
        if latents.kind == "separate":
            self.up_keys = nn.Parameter(torch.empty(dim, latents.keys))
            self.up_values = nn.Parameter(torch.empty(dim, latents.values))
        else:
            rows = 2 * dim * (len(latents.group) if latents.is_shared else 1)
            self.up = nn.Parameter(torch.empty(rows, latents.width))
        self.register_buffer("bias_keys", torch.zeros(dim))
        self.register_buffer("bias_values", torch.zeros(dim))
        self.codes = None if latents.widths is None else Codes(latents.widths)

    def euclidean(self):
        """The matrices that are free."""
        return [self.down]

    def ups(self):
        """Of the orthonormal matrices: name -> the rows of down that belong to its columns."""
        if self.kind == "separate":
            return {"up_keys": slice(0, self.keys), "up_values": slice(self.keys, None)}
        return {"up": slice(None)}

    @property
    def of_keys(self):
        return self.up_keys if self.kind == "separate" else self.up[self.row : self.row + self.dim]

    @property
    def of_values(self):
        return self.up_values if self.kind == "separate" else self.up[self.row + self.dim : self.row + 2 * self.dim]

    def parts(self, latent):
        """What keys and what values are rebuilt from."""
        return latent.split([self.keys, self.values], -1) if self.kind == "separate" else (latent, latent)

    def compress(self, inputs):
        return functional.linear(inputs, self.down)

    def rebuild(self, latent):
        """Keys and values [..., dim] of latents."""
        of_keys, of_values = self.parts(latent)
        keys = functional.linear(of_keys, self.of_keys, self.bias_keys)
        return keys, functional.linear(of_values, self.of_values, self.bias_values)

    def extra_repr(self):
        return f"{self.kind}, {self.down.shape[0]} numbers a token in place of {2 * self.dim}" + (
            f" in each of {self.up.shape[0] // (2 * self.dim)} layers" if self.kind == "shared" else ""
        )
