"""How the matrices of a conversion learn, and how those that rebuild stay orthonormal."""

import torch
from torch import nn

NAMES = ("adamw", "riemannian")
RETRACT_EVERY = 16  # steps


class Matrices:
    """The matrices of a converted model, each once: the free ones as `euclidean`, and the orthonormal ones."""

    def __init__(self, factors):
        self.factors = factors
        free, ups = {}, {}
        for each in factors:
            free |= {id(matrix): matrix for matrix in each.euclidean()}
            for name in each.ups():
                ups[id(getattr(each, name))] = getattr(each, name)
        self.euclidean, self.orthonormal = list(free.values()), list(ups.values())

    @property
    def all(self):
        return self.euclidean + self.orthonormal

    def owners(self, matrix):
        """(factors, rows of down) of each layer that rebuilds by it."""
        return [(each, rows) for each in self.factors for name, rows in each.ups().items()
                if getattr(each, name) is matrix]  # fmt: skip

    @torch.no_grad()
    def retract(self):
        """Make the orthonormal matrices so again; what is rebuilt stays the same, for down takes the difference."""
        for matrix in self.orthonormal:
            upright, across = torch.linalg.qr(matrix.double())
            signs = across.diagonal().sign()
            signs[signs == 0] = 1
            matrix.copy_(upright * signs)
            for factors, rows in self.owners(matrix):
                factors.down[rows] = (signs[:, None] * across @ factors.down[rows].double()).to(factors.down)

    def replace(self, make):
        """Let each orthonormal matrix be another parameter, in all layers that hold it."""
        for place, matrix in enumerate(self.orthonormal):
            new = make(matrix)
            for each in self.factors:
                for name in each.ups():
                    if getattr(each, name) is matrix:
                        setattr(each, name, new)
            self.orthonormal[place] = new


class AdamW:
    """AdamW on all matrices, and a QR decomposition of the orthonormal ones from time to time."""

    def __init__(self, matrices, euclidean_lr, riemannian_lr):
        self.matrices, self.steps = matrices, 0
        pairs = (matrices.euclidean, euclidean_lr), (matrices.orthonormal, riemannian_lr)
        groups = [{"params": params, "lr": rate} for params, rate in pairs]
        self.parts = [torch.optim.AdamW(groups, weight_decay=0.0)]

    def step(self):
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)
        self.steps += 1
        if self.steps % RETRACT_EVERY == 0:
            self.matrices.retract()

    def state_dict(self):
        return {"steps": self.steps, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, given):
        self.steps = given["steps"]
        for part, state in zip(self.parts, given["parts"]):
            part.load_state_dict(state)

    def finish(self):
        self.matrices.retract()


class Riemannian(AdamW):
    """AdamW on the free matrices, geoopt's Riemannian Adam on the Stiefel manifold for the orthonormal ones."""

    def __init__(self, matrices, euclidean_lr, riemannian_lr):
        try:
            import geoopt
        except ImportError as error:
            raise ImportError("optimizer='riemannian' needs geoopt: pip install whisperkv[lowrank]") from error
        self.matrices, self.steps = matrices, 0
        stiefel = geoopt.Stiefel()
        matrices.replace(lambda matrix: geoopt.ManifoldParameter(matrix.detach(), manifold=stiefel))
        self.parts = [
            torch.optim.AdamW(matrices.euclidean, lr=euclidean_lr, weight_decay=0.0),
            geoopt.optim.RiemannianAdam(matrices.orthonormal, lr=riemannian_lr),
        ]

    def load_state_dict(self, given):
        super().load_state_dict(given)
        for state in self.parts[1].state.values():
            state["step"] = int(state["step"])  # as geoopt counts; torch makes it a tensor, whose powers are rounded

    def finish(self):
        self.matrices.replace(lambda matrix: nn.Parameter(matrix.detach().clone().as_subclass(torch.Tensor)))
        super().finish()


def optimizer(name, matrices, euclidean_lr, riemannian_lr):
    return {"adamw": AdamW, "riemannian": Riemannian}[name](matrices, euclidean_lr, riemannian_lr)
