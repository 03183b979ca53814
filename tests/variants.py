"""Single changes to lesson 4's U-Net, for the rows of `measure_recipe.py`.

Each function changes a new network in place, before training.
"""

import functools
import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
lesson1 = importlib.import_module("01_time_embedding")
lesson2 = importlib.import_module("02_attention")
lesson3 = importlib.import_module("03_unet_uncond")


def replace(network, kind, make):
    """Replace every module of the class `kind` by make(module)."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kind):
                setattr(parent, name, make(child))


def drawn_again(network):
    """A control: nothing changes but the random weights, which are drawn once more."""
    for module in network.modules():
        if hasattr(module, "reset_parameters") and module.weight.any():  # what starts at zero still does
            module.reset_parameters()


# %% Residual blocks
class ShiftFirstConv(lesson3.TimePreActConv):
    """Scale and shift before the norm, as in the lecture."""

    def forward(self, x, embedding):
        return self.conv(F.silu(self.norm(self.scale_shift(x, embedding))))


def shift_first(network):
    for module in network.modules():
        if isinstance(module, lesson3.TimePreActConv):
            module.__class__ = ShiftFirstConv  # the same weights, another forward


def batch_norm(network):
    replace(network, nn.GroupNorm, lambda norm: nn.BatchNorm2d(norm.num_channels))


def no_zero_start(network):
    """The layers that start at zero get random weights too."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()


# %% Time
class Time(nn.Module):
    """Features of the time, `(n, columns)`, then the two linear layers of a `TimeEmbedding`."""

    def __init__(self, features, linear1, linear2):
        super().__init__()
        self.features, self.layers = features, nn.Sequential(linear1, nn.SiLU(), linear2)

    def forward(self, time):
        return self.layers(self.features(time))


def sines(max_period=10_000, scale=lambda time: time):
    """A change to the network: sines and cosines of scale(time), with this max_period."""

    def change(network):
        old, columns = network.embed_time, network.widths[0]
        features = functools.partial(lesson1.timestep_embedding, dim=columns, max_period=max_period)
        network.embed_time = Time(lambda time: features(scale(time)), old.linear1, old.linear2)

    return change


def lecture_time(network):
    """Notebook 28's way: times from 0 to 1, then batch norm and SiLU before the two linear layers."""
    sines(scale=to_unit)(network)
    network.embed_time.layers = nn.Sequential(nn.BatchNorm1d(network.widths[0]), nn.SiLU(), *network.embed_time.layers)


def to_ln_sigma(time):
    """The times of our U-Net, -1151 to 1096, as ln(sigma), -4.6 to 4.4."""
    return 4 * time / lesson3.TIME_SCALE


def to_unit(time):
    """The same, from 0 to 1."""
    return (time + 1151.3) / 2246.8


class Table(nn.Embedding):
    """A learned vector for each of 100 bins of ln(sigma), from -3.5 to 1.5: training rarely leaves this range."""

    def forward(self, time):
        return super().forward((20 * (to_ln_sigma(time) + 3.5)).long().clamp(0, 99))


def learned_table(network):
    old = network.embed_time
    network.embed_time = Time(Table(100, network.widths[0]), old.linear1, old.linear2)


def ln_sigma_alone(network):
    old = network.embed_time
    linear1 = nn.Linear(1, old.linear1.out_features)
    network.embed_time = Time(lambda time: to_ln_sigma(time)[:, None], linear1, old.linear2)


# %% Skips
class OtherSkip(nn.Module):
    """A block of the up path. It gets h and the skip concatenated, and adds the skip or ignores it."""

    def __init__(self, block, width, add):
        super().__init__()
        self.block, self.width = block, width
        self.match = add and (nn.Identity() if add == width else nn.Conv2d(add, width, 1))

    def forward(self, x, embedding):
        h, skip = x[:, : self.width], x[:, self.width :]
        return self.block(h + self.match(skip) if self.match else h, embedding)


def change_skips(network, added):
    width = network.widths[-1]
    for blocks, new_width in zip(network.up, reversed(network.widths), strict=True):
        for i, old in enumerate(blocks):
            skip = old.conv1.norm.num_channels - width
            block = network.make_block(width, new_width)
            block.attention = old.attention
            blocks[i] = OtherSkip(block, width, skip if added else None)
            width = new_width


def skips_added(network):
    change_skips(network, added=True)


def skips_cut(network):
    change_skips(network, added=False)


# %% Down and up
class SavedSequential(lesson3.Saved, nn.Sequential):
    pass


class EverySecond(nn.Module):
    def forward(self, x):
        return x[:, :, ::2, ::2]


def pool_down(network):
    """Average pooling and a convolution instead of a convolution with stride 2."""
    width = network.widths[0]
    network.downsample[0] = SavedSequential(nn.AvgPool2d(2), nn.Conv2d(width, width, 3, padding=1))


def pool_alone(network):
    network.downsample[0] = SavedSequential(nn.AvgPool2d(2))


def every_second_pixel(network):
    network.downsample[0] = SavedSequential(EverySecond())


class TransposedConv(nn.Module):
    """A 4×4 transposed convolution of stride 2. It starts as nearest-neighbour upsampling followed by the 3×3
    convolution `conv`, and its weights have a convolution's order, out before in, for Muon."""

    def __init__(self, conv):
        super().__init__()
        spread = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # each of 3 taps goes to two of 4
        self.weight, self.bias = nn.Parameter(spread @ conv.weight.detach() @ spread.T), conv.bias

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight.transpose(0, 1), self.bias, stride=2, padding=1)


def transposed_up(network):
    """A transposed convolution instead of nearest-neighbour upsampling and a convolution."""
    network.upsample[0] = TransposedConv(network.upsample[0][1])


# %% Attention
def no_attention(network):
    replace(network, lesson2.AttentionBlock, lambda block: nn.Identity())


class NewAttention(lesson2.AttentionBlock):
    """A new attention layer in place of `block`. A pixel attends to all pixels if `tokens` is "n (h w)", to its row if
    "(n h) w", to its column if "(n w) h"."""

    def __init__(self, block, tokens):
        channels, attention = block.norm.num_channels, block.attention
        super().__init__(channels, attention.heads, block.norm.num_groups, attention.attention_fn)
        lesson3.zero_(self.attention.proj)
        self.tokens = tokens

    def forward(self, x):
        n, _, h, w = x.shape
        attended = self.attention(rearrange(self.norm(x), f"n c h w -> {self.tokens} c"))
        return x + rearrange(attended, f"{self.tokens} c -> n c h w", n=n, h=h, w=w)


def layers_in_a_row(network, *tokens):
    replace(network, lesson2.AttentionBlock, lambda block: nn.Sequential(*(NewAttention(block, t) for t in tokens)))


def axial(network):
    """Attention along the rows, then along the columns."""
    layers_in_a_row(network, "(n h) w", "(n w) h")


def two_layers(network):
    """Two attention layers, which start with the same weights as those of `axial`."""
    layers_in_a_row(network, "n (h w)", "n (h w)")


class Positions(nn.Module):
    """A learned vector for each of 7 × 7 positions, added to the normalised activations."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.positions = norm, nn.Parameter(torch.zeros(norm.num_channels, 7, 7))

    def forward(self, x):
        return self.norm(x) + self.positions


def learned_positions(network):
    for module in network.modules():
        if isinstance(module, lesson2.AttentionBlock):
            module.norm = Positions(module.norm)
