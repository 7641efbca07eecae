"""What of a Whisper's calibration learns: the matrices of both caches, as the caches use them."""

import torch
from torch import nn
from torch.nn import functional

from ..calibration import Codes, by_head
from ..mixed import rounded, scales_of

PACE = 40.0  # so that MLATrainer's usual rate is a good one
FAINT = 1e-3  # of the largest deviation: a channel that varies less counts for as much


class Free(nn.Module):
    """Matrices that are bound to nothing while they learn."""

    def euclidean(self):
        return list(self.parameters())

    def ups(self):
        return {}


class Own(Free):
    """What the self-attention of a layer keeps of a token: `down` times keys and values, weighed. `up` times that is
    what they are rebuilt as. See whisperkv.calibration.LowRank.

    there  [rank, 2 * width], and back [2 * width, rank]: what is added to `down` and to `up`. A step of any of their
           numbers changes what is rebuilt by as much: they are in units of what is lost, over what a direction has
    """

    def __init__(self, tensors, index, rank, attention):
        super().__init__()
        its = {name.removeprefix("self."): each[index] for name, each in tensors.items() if name.startswith("self.")}
        basis, root = its["basis"], its["root"]  # root [2, heads, head_dim, head_dim]
        lost, most = its["deviations"][rank:].square().mean().nan_to_num(0).sqrt(), its["deviations"][: basis.shape[1]]
        lost, most = (each.clamp(min=FAINT * float(most[0])) for each in (lost, most))
        units = lost / most
        self.there, self.back = nn.Parameter(torch.zeros(rank, len(basis))), nn.Parameter(torch.zeros(len(basis), rank))
        weights = [project.weight.detach().float().cpu() for project in (attention.k_proj, attention.v_proj)]
        both = torch.cat(weights)
        offset = both @ its["mean"]
        if attention.v_proj.bias is not None:
            offset[len(offset) // 2 :] += attention.v_proj.bias.detach().float().cpu()
        for name, buffer in {
            "down": basis[:, :rank].T,
            "up": its.get("back", basis)[:, :rank],
            "units": PACE * units[:rank],
            "spread": PACE * (torch.eye(len(basis)) + basis * (units - 1) @ basis.T),
            "weighed": by_head(root, both),
            "inverse": its["inverse"],
            "mean": its["mean"],
            "offset": offset,
        }.items():
            self.register_buffer(name, buffer.clone())

    def matrices(self):
        """down [rank, 2 * width] and up [2 * width, rank]."""
        return self.down + self.there @ self.spread, self.up + self.back * self.units

    def forward(self, states):
        """Keys and values [..., width]."""
        down, up = self.matrices()
        latent = functional.linear(states.float() - self.mean, down @ self.weighed)
        return functional.linear(latent, by_head(self.inverse, up), self.offset).to(states.dtype).chunk(2, -1)

    def learned(self):
        """The same with `up` orthonormal."""
        down, up = (matrix.double() for matrix in self.matrices())
        upright, across = torch.linalg.qr(up)
        return {"basis": (across @ down).T.float(), "back": upright.float()}


class Heard(Free):
    """What is held of the encoder's output. See whisperkv.calibration.Codes.

    there  [width, channels], and back [channels, width]: what is added to what makes codes and to what is rebuilt of
           them, of all channels, in units of what rounding loses over what a channel has
    """

    def __init__(self, tensors, bits, group):
        super().__init__()
        self.codes, self.group = Codes(tensors, bits), group
        self.places, errors = self.codes.places, tensors["cross.errors"]
        deviations = errors[0].sqrt()
        lost = float(errors[self.codes.bits.long(), self.places].mean().sqrt())
        units = PACE * lost / deviations.clamp(min=FAINT * float(deviations.amax()))
        self.there = nn.Parameter(torch.zeros(len(units), len(self.places)))
        self.back = nn.Parameter(torch.zeros(len(self.places), len(units)))
        self.register_buffer("units", units)
        for name in ("there", "back", "mean"):
            self.register_buffer(f"all_{name}", tensors[f"cross.{name}"].clone())

    def matrices(self):
        """[width, channels] and [channels, width], of the channels that have codes."""
        there = self.all_there[:, self.places] + self.all_there * self.units @ self.there
        return there, self.all_back[self.places] + self.units[self.places, None] * self.back @ self.all_back

    def forward(self, states):
        """What is rebuilt of states [audios, frames, width]."""
        there, back = self.matrices()
        frames = (states.float() - self.all_mean) @ there
        lengths = torch.full((len(frames),), frames.shape[1], device=frames.device)
        with torch.no_grad():
            bits = self.codes.bits.to(frames.device)
            scales = scales_of(frames, lengths, bits, self.group)
            lost = rounded(frames, bits, scales, self.group) - frames
        return ((frames + lost) @ back + self.all_mean).to(states.dtype)

    def learned(self):
        learned = {"there": self.all_there.clone(), "back": self.all_back.clone()}
        learned["there"][:, self.places], learned["back"][self.places] = self.matrices()
        return learned
