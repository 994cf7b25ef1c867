"""Networks of another library, as far as haloseg knows, exported as its users would."""

import warnings

import torch
from torch import nn
from torch.nn import functional


class Encoder(nn.Module):
    """A network in another hand: strided convolutions, BatchNorm, upsampling to the skip's size, a skip."""

    def __init__(self, dims=2, in_channels=1, n_classes=3, *, end=nn.Identity):
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.fine = nn.Sequential(conv(in_channels, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(conv(4, 6, 3, stride=2, padding=1), norm(6), nn.SiLU(), conv(6, 4, 3, padding=1))
        self.last, self.end = conv(8, n_classes, 1), end()

    def forward(self, x):
        """Return (batch, n_classes, *spatial) of (batch, in_channels, *spatial), even sizes."""
        fine = self.fine(x)
        deep = functional.interpolate(self.deep(fine), size=fine.shape[2:], mode="nearest")
        return self.end(self.last(torch.cat((fine, deep), dim=1)))


def random_network(make, seed=0):
    """Return a network in eval mode whose BatchNorm statistics are not those of a fresh one."""
    torch.manual_seed(seed)
    network = make().eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return network


def saved(path, network, shape, *, dynamic):
    """Export a network with an example of this shape, save it, and return the path."""
    sizes = None
    if dynamic:
        sizes = (dict.fromkeys(range(2, len(shape)), torch.export.Dim.AUTO),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own exporter warns of its parts
        program = torch.export.export(network, (torch.randn(shape),), dynamic_shapes=sizes)
        torch.export.save(program, path)
    return str(path)
