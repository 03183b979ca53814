"""Lesson 3: a U-Net learns to take noise away, and so to make garments.

First the network without time, built in small steps; then noise and time; then what it is trained to do, and how
samples come out of it (lecture sections "U-Net" and "unconditional model"; notebook 26). Last, what a run needs.

    python 03_unet_uncond.py [--no-time] [--epochs E] [--help]   trains the unconditional model and samples from it
    python 03_unet_uncond.py --show                              prints and draws what the sections say, in two minutes
"""

import argparse
import copy
import functools
import importlib
import importlib.util
import io
import math
import os
import shlex
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data

lesson1 = importlib.import_module("01_time_embedding")
DATA = {"name": "auto", "data_dir": None}  # what the sections load; the command line can change it
load_once = functools.cache(data.load)


def load_images(split, n):
    """The first n images, float32 `(n, 1, 28, 28)` in [-1, 1], and the data set's name."""
    images, _, _, name = load_once(split=split, **DATA)
    return F.interpolate(torch.from_numpy(images[:n])[:, None] / 127.5 - 1, size=(28, 28)), name


# %% 1. A convolution comes after its norm and its activation
# A signal must come through all layers of a network, or the last ones don't know what the image was. A shortcut,
# x + ..., lets it pass; but an activation *after* the sum, as in the lecture's first residual blocks, bends it again,
# block after block. Put norm and activation in front of each convolution, and what leaves a block is a plain sum. (The
# norm at the end of a branch does its part, too: it makes what is added as large as the signal.)
#
# The same layers in both orders; x is `(n, c, h, w)` all the way:
def activate_last(x, convs, norms):
    """Activations after the convolution and the sum (He et al. 2015, "Deep Residual Learning")."""
    h = F.silu(norms[0](convs[0](x)))
    return F.silu(x + norms[1](convs[1](h)))


def activate_first(x, convs, norms):
    """Activations in front of the convolutions (He et al. 2016, "Identity Mappings in Deep Residual Networks")."""
    h = convs[0](F.silu(norms[0](x)))
    return x + convs[1](F.silu(norms[1](h)))


@torch.no_grad()
def signal_through(block, x):
    """x `(n, 16, h, w)` and the activations after each of 20 new blocks."""
    torch.manual_seed(0)
    states = [x]
    for _ in range(20):
        convs = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)]
        norms = [nn.GroupNorm(4, 16) for _ in range(2)]
        states.append(block(states[-1], convs, norms))
    return states


def correlation(a, b):
    """Of two tensors `(n, c, h, w)`, each channel's mean taken off: 1 is the same image, 0 is nothing in common."""
    a, b = (tensor - tensor.mean(dim=(0, 2, 3), keepdim=True) for tensor in (a, b))
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@lesson1.section
def show_order():
    images, name = load_images("test", 32)
    torch.manual_seed(0)
    x = nn.Conv2d(1, 16, 3, padding=1)(images).detach()  # n c h w
    shown, pictures, left = (0, 1, 2, 5, 10, 20), [], {}
    for order in (activate_first, activate_last):
        states, label = signal_through(order, x / x.std()), order.__name__.replace("_", " ")
        left[label] = [correlation(states[i], x) for i in shown]
        print(f"   {label}: correlation with what went in", *(f"{value:.2f}" for value in left[label]))
        pictures += [states[i][0, :1] / (2 * states[i][0, 0].abs().mean()) for i in shown]  # one channel, 1 h w
    first, last = (values[-1] for values in left.values())
    title = f"Correlation after 20 blocks: {first:.2f} if activations come first, {last:.2f} if last ({name})"
    return lesson1.plot_grid(title, torch.stack(pictures).clamp(-1, 1), 6, left, [f"after {i}" for i in shown])


# %% 2. The residual block
# So norm, activation and convolution are one layer, in this order. The norm is a group norm (Wu and He 2018): mean and
# variance of some channels of one image. Batch norm, which the lecture uses, takes them of all images of a batch. But
# the images will have different noise levels, and the activations of one would depend on how noisy the others are.
class PreActConv(nn.Module):
    """GroupNorm, SiLU, 3×3 convolution: `(n, in_channels, h, w)` -> `(n, out_channels, h, w)`."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.silu(self.norm(x)))


def zero_(layer):
    """Set a layer's weights and bias to zero, in place. Returns the layer."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# What two convolutions find is added to what came in. The last one starts at zero, so a new block changes nothing but
# perhaps the width: the network begins as a short one, and each block joins in when it has learned something.
class ResBlock(nn.Module):
    """Two pre-activation convolutions and a shortcut, which is a 1×1 convolution where the width changes."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.conv1 = PreActConv(in_channels, out_channels, groups)
        self.conv2 = PreActConv(out_channels, out_channels, groups)
        zero_(self.conv2.conv)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x):
        """`(n, in_channels, h, w)` -> `(n, out_channels, h, w)`."""
        return self.shortcut(x) + self.conv2(self.conv1(x))


@lesson1.section
def show_block():
    torch.manual_seed(0)
    x, wider = torch.randn(8, 16, 14, 14), ResBlock(16, 32, groups=4)
    h = wider.conv1(x)
    steps = {"x": x, "conv1": h, "conv2": wider.conv2(h), "shortcut(x)": wider.shortcut(x), "sum": wider(x)}
    print("   " + ", ".join(f"{name} {tuple(step.shape)}" for name, step in steps.items()))
    print(f"   a new block of the same width changes its input by {(ResBlock(16, 16, 4)(x) - x).abs().max():g}")
    noisier = torch.cat([x[:1], x[1:] + 3 * torch.randn_like(x[1:])])  # the first image is the same
    for name, norm in {"batch": nn.BatchNorm2d(16), "group": nn.GroupNorm(4, 16)}.items():
        change = (norm(noisier) - norm(x))[0].norm() / norm(x)[0].norm()
        print(f"   {name} norm, and the other images get noisier: this one's activations change by {change:.0%}")


# %% 3. Saved: the up path will need what the down path computed
# A mix-in, which keeps the output of the class that it stands in front of: `super()` is the next one in the order in
# which Python searches the ancestors. Behind a module class it would never be asked, as the module's `forward` is found
# first.
class Saved:
    """Keeps a module's output until the up path takes it."""

    saved = None

    def forward(self, *inputs):
        self.saved = super().forward(*inputs)
        return self.saved

    def take(self):
        """The saved output, which is forgotten here: no activation outlives a forward pass that ends."""
        saved, self.saved = self.saved, None
        return saved


class SavedResBlock(Saved, ResBlock):
    pass


class SavedConv(Saved, nn.Conv2d):
    pass


@lesson1.section
def show_saved():
    class MixedInBehind(nn.Conv2d, Saved):
        """What not to do."""

    for kind in (SavedConv, MixedInBehind):
        conv, x = kind(1, 4, 3), torch.randn(2, 1, 8, 8)
        order = " -> ".join(parent.__name__ for parent in kind.__mro__[:-1])
        y, kept = conv(x), conv.saved
        print(f"   {order}: runs {kind.forward.__qualname__}, saves {'nothing' if kept is None else tuple(kept.shape)}")
        print(f"      is a convolution: {torch.equal(y, F.conv2d(x, conv.weight, conv.bias))}")


# %% 4. The U-Net (Ronneberger et al. 2015)
# Down: blocks, and convolutions of stride 2, which halve height and width; so a 3×3 convolution sees ever more of the
# garment. A level has a quarter of the pixels of the one above and twice the channels, so that all levels cost about
# the same. (The table's 32 to 256 channels are the lecture's for Fashion-MNIST, fewer than the 224 to 896 of diffusers'
# UNet2DModel. `--no-time --preset lecture` trains this one.)
# Up: the same the other way. Beside what comes from below, each block there gets what was saved at its size on the way
# down, as more channels; one block more, because a level saves one activation more than it has blocks.
class UNet(nn.Module):
    """Down path, middle, up path; every activation saved on the way down is concatenated back on the way up.

    channels: of the image, in and out.
    widths:   the channels of each level; each level has half the height and width of the one before.
    depth:    residual blocks a level on the way down; one more on the way up.
    groups:   of every group norm; must divide every width.
    """

    def __init__(self, channels, widths, depth, groups):
        super().__init__()
        self.widths, self.groups = tuple(widths), groups
        self.conv_in = SavedConv(channels, widths[0], 3, padding=1)
        width, skips = widths[0], [widths[0]]  # the channels by now, and of all that is saved

        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, new_width in enumerate(widths):  # the lecture's down_block ends with what begins the next turn
            if level > 0:
                self.downsample.append(SavedConv(width, width, 3, stride=2, padding=1))
                skips.append(width)
            blocks = nn.ModuleList()
            for _ in range(depth):
                blocks.append(self.make_block(width, new_width, saved=True))
                width = new_width
                skips.append(width)
            self.down.append(blocks)

        self.middle = nn.ModuleList([self.make_block(width, width), self.make_block(width, width)])

        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, new_width in enumerate(reversed(widths)):  # the lowest level first
            if level > 0:
                smooth = nn.Conv2d(width, width, 3, padding=1)  # the steps that remain if each pixel becomes four
                self.upsample.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), smooth))
            blocks = nn.ModuleList()
            for _ in range(depth + 1):
                blocks.append(self.make_block(width + skips.pop(), new_width))
                width = new_width
            self.up.append(blocks)

        self.conv_out = PreActConv(width, channels, groups)
        zero_(self.conv_out.conv)

    def make_block(self, in_channels, out_channels, saved=False):
        """A residual block; later U-Nets make others."""
        return (SavedResBlock if saved else ResBlock)(in_channels, out_channels, self.groups)

    def forward(self, x, *told):
        """x and the result: `(n, channels, height, width)`. told: what else the blocks are told, in later U-Nets.

        Raises ValueError where height or width can't be halved once for each level but the first.
        """
        step = 2 ** len(self.downsample)
        if x.shape[2] % step or x.shape[3] % step:
            raise ValueError(f"height and width must be multiples of {step}, got {x.shape[2]} × {x.shape[3]}")
        h, savers = self.conv_in(x), [self.conv_in]  # n widths[0] height width
        for level, blocks in enumerate(self.down):
            if level > 0:
                h = self.downsample[level - 1](h)  # n c h w -> n c h/2 w/2
                savers.append(self.downsample[level - 1])
            for block in blocks:
                h = block(h, *told)  # n c h w -> n new_width h w
                savers.append(block)
        for block in self.middle:
            h = block(h, *told)
        for level, blocks in enumerate(self.up):
            if level > 0:
                h = self.upsample[level - 1](h)  # n c h w -> n c 2h 2w
            for block in blocks:
                h = block(torch.cat([h, savers.pop().take()], dim=1), *told)  # n c+skip h w -> n new_width h w
        return self.conv_out(h)  # n channels height width


def measure_layers(network, x):
    """For each layer on x's way through a U-Net: its name, its output's shape, its parameters, its multiply-adds."""
    rows = []

    def note(name, layer, inputs, y):
        weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 4)
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        rows.append((name, *y.shape[1:], parameters, weights * y[0, 0].numel()))  # a weight is used at each pixel

    for name, layer in network.named_modules():
        if name == "conv_out" or isinstance(layer, ResBlock | SavedConv | nn.Sequential):
            layer.register_forward_hook(functools.partial(note, name))
    network(x)
    return rows


@lesson1.section
def show_layers():
    rows = measure_layers(UNet(1, (32, 64, 128, 256), depth=2, groups=2), torch.zeros(1, 1, 32, 32))  # the lecture's
    print("                  c    h    w    parameters   multiply-adds")
    for row in rows:
        print("   {:12}{:4}{:5}{:5}{:14,}{:16,}".format(*row))
    heights, totals = np.array([row[2] for row in rows]), np.array([row[4:] for row in rows])
    for height in (32, 16, 8, 4):
        share = totals[heights == height].sum(axis=0) / totals.sum(axis=0)
        print("   at {0:2} × {0:2}: {1:.0%} of the parameters, {2:.0%} of the operations".format(height, *share))


# %% 5. What the skips are for
# At the bottom of the U a garment is 7 × 7 pixels of 32 channels here. There would be room for where its edges run, but
# the network would have to learn to pack that into channels, and to unpack it again. The skips hand it over. To see it,
# we cut them: every saved activation arrives as zeros. Both nets start from the same weights, see the same batches, and
# are to take away one and the same strength of noise.
def cut_skips(network):
    for layer in network.modules():
        if isinstance(layer, Saved):
            layer.take = lambda take=layer.take: torch.zeros_like(take())  # hides this one layer's method


def train_skips(cut, images, steps=100):
    """A small U-Net trained to take noise of strength 0.5 from images `(n, 1, h, w)`, and its loss at each step."""
    torch.manual_seed(0)
    network = UNet(1, (8, 16, 32), depth=1, groups=4)
    if cut:
        cut_skips(network)
    optimizer, losses = torch.optim.AdamW(network.parameters()), []
    for step in range(steps):
        x0 = images[torch.randint(len(images), (32,))]
        loss = F.mse_loss(network(x0 + 0.5 * torch.randn_like(x0)), x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
    return network.requires_grad_(False), losses


@lesson1.section
def show_skips():
    (images, name), (unseen, _) = load_images("train", 512), load_images("test", 8)
    torch.manual_seed(1)
    noisy = unseen + 0.5 * torch.randn_like(unseen)
    rows, curves, errors = {"garment": unseen, "with noise": noisy}, {}, []
    for row, cut in {"with skips": False, "skips cut": True}.items():
        network, curves[row] = train_skips(cut, images)
        rows[row] = network(noisy)
        errors.append(float(F.mse_loss(rows[row], unseen)))
        print(f"   {row}: error {np.mean(curves[row][-20:]):.3f} in training, {errors[-1]:.3f} on test images")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), width_ratios=(2, 3))
    lesson1.plot_lines(left, range(100), curves, xlabel="step of training", ylabel="mean squared error", ylim=(0, 0.4))
    lesson1.plot_images(right, torch.cat(list(rows.values())), len(unseen), rows)
    figure.suptitle(f"Without skips {errors[1] / errors[0]:.1f} times the error in 100 steps: edges are lost ({name})")
    return figure


# %% 6. Noise: x = x0 + sigma · noise
# From now on there is noise of every strength. sigma says how strong; pixels go from -1 to 1. Noise of 0.02 can hardly
# be seen; at 80 nothing but noise can (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
# Models", EDM; the lecture's notebook 26). At one end x is all but the answer, at the other it says nothing of it. In
# between, where noise hides an edge, the best single answer is the mean of all the edges that there may be: a blur. To
# make one garment of it takes many small steps (section 10). (Notebook 28 goes back to a cosine schedule, and predicts
# the noise; we keep 26's way.)
SIGMA_MIN, SIGMA_MAX = 0.01, 80.0  # the ends of sampling (EDM begins at 80, too, and ends at 0.002)


def add_noise(x0, sigma, noise):
    """`(n, c, h, w)` and noise levels `(n,)` -> `(n, c, h, w)`; the noise has variance one."""
    return x0 + sigma.view(-1, 1, 1, 1) * noise


@lesson1.section
def show_noise():
    garment, name = load_images("test", 1)
    torch.manual_seed(0)
    sigmas = torch.logspace(math.log10(0.02), math.log10(80), 10)
    x, titles = add_noise(garment, sigmas, torch.randn(10, 1, 28, 28)), []
    for sigma, picture in zip(sigmas, x, strict=True):
        share = correlation(picture[None], garment)
        print(f"   sigma {sigma:6.2f}: pixels {picture.min():7.1f} to {picture.max():6.1f}, correlation {share:5.2f}")
        titles.append(f"σ = {sigma:.2g}\n{share:.2f}")
    x = x / x.abs().amax(dim=(1, 2, 3), keepdim=True)
    return lesson1.plot_grid(f"More noise, less correlation with the garment ({name})", x, 10, titles=titles)


# %% 7. Preconditioning: c_in, c_skip, c_out and c_noise
# Two things would make learning hard. The standard deviation of x is 0.7 at one end and 80 at the other, and a network
# likes its input to be of one size. And neither plain question is good at both ends. To ask for x0 is wrong at low
# noise: x is nearly the answer, and a network that has to repeat its input adds errors of its own. To ask for the noise
# is wrong at high noise: x0 is x - sigma · noise, and sigma multiplies every error. So the denoiser's answer is
#
#     x0_hat = c_skip · x + c_out · network(c_in · x, c_noise)
#
# c_in scales x to variance one, whatever sigma is. c_skip lets x itself through, as far as it can be believed: nearly
# all of it at low noise, nothing at high. c_out scales what the network adds, and its target has variance one, too: at
# low noise it is minus the noise, at high noise the garment, in between a mix. (c_skip is chosen so that c_out, by
# which the network's errors are multiplied, is as small as it can be.) c_noise is the time that the network is told:
# ln(sigma) / 4, times a constant that makes the hands of lesson 1's clock move.
#
# And the work can be done on patches (pixel_unshuffle): 2×2 pixels become 4 channels of one pixel, so that the network
# has a quarter of the pixels to go over.
TIME_SCALE = 1000  # so the time goes from -1151 to 1096, a range that fits lesson 1's max_period


class Denoiser(nn.Module):
    """A network with EDM's preconditioning (Karras et al. 2022, table 1).

    network:    takes `(n, channels · patch², h/patch, w/patch)`, c_noise `(n,)` and, if it has labels, one `(n,)`.
    sigma_data: standard deviation of the training images.
    patch:      side of the patches that become channels before the network, and pixels again after it.
    precision:  the network computes in this type (autocast) if given; everything around it stays as it is.
    """

    def __init__(self, network, sigma_data, patch=1, precision=None):
        super().__init__()
        self.network, self.sigma_data, self.patch, self.precision = network, sigma_data, patch, precision

    @property
    def device(self):
        return next(self.network.parameters()).device

    def scales(self, sigma):
        """c_skip, c_out and c_in of each sigma."""
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()

    def c_noise(self, sigma):
        """The time that the network is told of each sigma."""
        return TIME_SCALE * sigma.log() / 4

    def forward(self, x, sigma, *label):
        """x: noisy images `(n, c, h, w)`; sigma: `(n,)`, positive; label: `(n,)`, if any. Returns x0_hat like x."""
        sigma = sigma.to(x.device)
        c_skip, c_out, c_in = self.scales(sigma.view(-1, 1, 1, 1))  # n 1 1 1, each
        with torch.autocast(x.device.type, self.precision, enabled=self.precision is not None):
            h = F.pixel_unshuffle(c_in * x, self.patch)  # n (c patch patch) h/patch w/patch
            h = self.network(h, self.c_noise(sigma), *label)
        return c_skip * x + c_out * F.pixel_shuffle(h.to(x.dtype), self.patch)


@lesson1.section
def show_preconditioning():
    images, _ = load_images("test", 500)
    torch.manual_seed(0)
    noise, denoiser = torch.randn_like(images), Denoiser(None, sigma_data=float(images.std()))
    print(f"   sigma_data {denoiser.sigma_data:.3f}")
    print("     sigma   c_skip    c_out     c_in  c_noise    deviation of x   of c_in x   of the target")
    for sigma in torch.tensor([0.02, 0.1, 0.5, 2, 10, 80]):
        c_skip, c_out, c_in = denoiser.scales(sigma)
        x = images + sigma * noise
        deviations = x.std(), (c_in * x).std(), ((images - c_skip * x) / c_out).std()
        row = sigma, c_skip, c_out, c_in, denoiser.c_noise(sigma), *deviations
        print("   {:7.2f}{:9.4f}{:9.4f}{:9.4f}{:9.0f}{:18.2f}{:12.2f}{:16.2f}".format(*row))
    sigmas = torch.logspace(-2, 2, 200)
    names = ("c_skip: how much of x is kept", "c_out: how much is added", "c_in")
    figure, axes = plt.subplots(figsize=(8, 3.8))
    curves = dict(zip(names, denoiser.scales(sigmas), strict=True))
    lesson1.plot_lines(axes, sigmas, curves, xscale="log", xlabel="sigma", ylabel="factor")
    figure.suptitle("At low noise x is kept, at high noise the network makes it all")
    return figure


# %% 8. Time
# c_in has made every x about equally large, so its size doesn't tell the network how noisy it is. Each block is told:
# lesson 1's embedding, which all blocks share, becomes a scale and a shift for each channel. They act *after* the
# second norm. The lecture has them in front of it, where a group norm would take out again what is common to a group.
class TimePreActConv(PreActConv):
    """A pre-activation convolution with scale and shift between norm and activation."""

    def __init__(self, in_channels, out_channels, groups, embedding_dim):
        super().__init__(in_channels, out_channels, groups)
        self.scale_shift = lesson1.ScaleShift(embedding_dim, in_channels)

    def forward(self, x, embedding):
        return self.conv(F.silu(self.scale_shift(self.norm(x), embedding)))


class TimeResBlock(ResBlock):
    """A residual block that takes activations and the embedding `(n, embedding_dim)`."""

    def __init__(self, in_channels, out_channels, groups, embedding_dim):
        super().__init__(in_channels, out_channels, groups)
        self.conv2 = TimePreActConv(out_channels, out_channels, groups, embedding_dim)  # in the place of ResBlock's
        zero_(self.conv2.conv)

    def forward(self, x, embedding):
        return self.shortcut(x) + self.conv2(self.conv1(x), embedding)


class SavedTimeResBlock(Saved, TimeResBlock):
    pass


class TimeUNet(UNet):
    """The U-Net with time (the arguments are UNet's)."""

    def __init__(self, channels, widths, depth, groups):
        super().__init__(channels, widths, depth, groups)
        self.embed_time = lesson1.TimeEmbedding(widths[0])

    def make_block(self, in_channels, out_channels, saved=False):
        kind = SavedTimeResBlock if saved else TimeResBlock
        return kind(in_channels, out_channels, self.groups, 4 * self.widths[0])

    def forward(self, x, time):
        """x and the result: `(n, channels, height, width)`; time: `(n,)`, float."""
        return super().forward(x, self.embed_time(time))


class UntimedUNet(UNet):
    """The first U-Net, given a time, which it ignores (like the lecture's first one, which isn't told sigma)."""

    def forward(self, x, time):
        return super().forward(x)


@lesson1.section
def show_time():
    torch.manual_seed(0)
    x, norm = torch.randn(4, 16, 14, 14), nn.GroupNorm(4, 16)
    before, after = (norm(3 * x + 1) - norm(x)).abs().mean(), (3 * norm(x) + 1 - norm(x)).abs().mean()
    print(f"   all channels times 3, plus 1: in front of the norm a change of {before:.0e}, after it of {after:.1f}")
    for kind in (UNet, TimeUNet):
        print(f"   {kind.__name__}: {sum(p.numel() for p in kind(1, (16, 32), 1, 4).parameters()):,} parameters")


# %% 9. Training
# Take images, a noise level and noise for each, and let the denoiser say what the images were.
def denoising_loss(denoiser, x0, sigma, noise, *label):
    """The squared error of x0_hat, weighted by 1 / c_out² (Karras et al. 2022, equation 8). Returns `(n,)`.

    What is left is the plain squared error of the network's own output, whose target is (x0 - c_skip · x) / c_out, as
    in the lecture's `noisify`. A new network says 0, and the error is 1 at low noise and 1 + (mean / sigma_data)² of
    the images at high noise: no sigma outweighs the others by much.
    """
    x0_hat = denoiser(add_noise(x0, sigma, noise), sigma, *label)
    _, c_out, _ = denoiser.scales(sigma)
    return (x0_hat - x0).square().mean(dim=(1, 2, 3)) / c_out**2


# An epoch is all images in random order. And whatever is random in a step depends on seed and step alone (on one kind
# of device), so that a run that was interrupted, or is shared among processes, sees the same as one that was neither.
@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order in which an epoch goes through n images: `(n,)`."""
    return np.random.default_rng((seed, epoch)).permutation(n)


# Not every level is worth the same. Little noise can't be told from the image (what is missed is small in pixels, but
# not beside the noise, and so it is weighted), and behind a lot of it the image can't be seen: at both ends the
# weighted loss stays high, whatever is learned. So most of the training is in between: two of three levels are from
# 0.14 to 1. (EDM has -1.2 and 1.2, which are from 0.09 to 1: docs/measurements.md.) Sampling begins at 80, which is
# practically never drawn: of 2,000 levels one is above 10. From there up, c_in · x is little but noise of variance
# one, and the right answer comes ever nearer to the mean of all garments; what the network gets wrong there is small
# beside the noise that is left.
P_MEAN, P_STD = -1.0, 1.0  # of ln(sigma), which is normally distributed


def draw_batches(images, labels, batch_size, seed, steps):
    """Yield (step, x0, sigma, noise, label) for each of `steps`, a range.

    images: uint8 `(n, c, h, w)`, labels: int64 `(n,)`, both on the device. Image i of step s is image number
    p = s · batch_size + i of the training: entry p % n of permutation p // n.
    """
    n, device = len(images), images.device
    for step in steps:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        chosen = torch.tensor([permutation(n, seed, p // n)[p % n] for p in numbers])
        chosen = chosen.to(device, non_blocking=device.type == "cuda")  # or each step would wait for the GPU
        mixed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)  # similar pairs, unrelated seeds
        torch.manual_seed(int(mixed[0]))
        x0 = images[chosen].float() / 127.5 - 1
        sigma = (P_MEAN + P_STD * torch.randn(batch_size, device=device)).exp()
        yield step, x0, sigma, torch.randn_like(x0), labels[chosen]


def schedule(step, steps):
    """The share of the highest learning rate: up over the first 5 % of the steps, then straight down to zero."""
    warm_up = max(1, round(0.05 * steps))
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


# Single gradients may be huge, early ones above all; warm-up and clipping keep them from throwing the weights off. And
# the latest weights jump about, while their mean doesn't: it is the mean that will sample.
def train(denoiser, ema, optimizers, batches, steps):
    """Train, and yield (step, loss, norm of the gradients) after each step, both as tensors on the device.

    batches: yields what `draw_batches` does, the label only if the network takes one. ema: a copy of the denoiser,
    which becomes the moving average of its weights. steps: of the whole training, for the schedule.
    """
    for step, x0, sigma, noise, *label in batches:
        loss = denoising_loss(denoiser, x0, sigma, noise, *label)
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * schedule(step, steps)
        loss.mean().backward()
        norm = nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        update_ema(ema, denoiser, step)
        yield step, loss.detach().mean(), norm


@torch.no_grad()
def update_ema(ema, denoiser, step):
    """Move the average towards the weights: it looks back over about a tenth of the steps so far, however many (an
    exponential moving average, EMA, whose window grows; Karras et al. 2024)."""
    for slow, fast in zip(ema.parameters(), denoiser.parameters(), strict=True):
        slow.lerp_(fast, min(1.0, 10 / (step + 1)))


# How much does time help? By a few per cent in these 120 steps of a small net, which is less than one might expect. One
# reason: an image shows by itself how noisy it is. Wherever there is background, all pixels should be the same, and
# differ by as much as the noise is strong. The table's last line has their standard deviation in a corner of 3 × 3
# pixels, as the network sees it, after c_in: it tells low levels apart, but hardly those above 1. (c_in, c_skip and
# c_out know sigma for both nets.)
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # of 1,000 levels drawn in training, 994 are within


@torch.no_grad()
def loss_by_level(denoiser, images, levels=LEVELS):
    """The mean loss on images `(n, c, h, w)` at each noise level, always with the same noise; a list."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return [float(denoising_loss(denoiser, images, torch.full((len(images),), s), noise).mean()) for s in levels]


def train_small(network_class, images, choose, steps=120):
    """The average of a small denoiser that was trained on `(n, 1, h, w)` in [-1, 1], and its losses: with the same
    batches and noise whatever the class and choose(denoiser), the optimizers."""
    torch.manual_seed(0)
    denoiser = Denoiser(network_class(4, (16, 32), depth=1, groups=4), float(images.std()), patch=2)
    ema = copy.deepcopy(denoiser)
    pixels, labels = ((images + 1) * 127.5).round().byte(), torch.zeros(len(images), dtype=torch.int64)
    batches = (batch[:-1] for batch in draw_batches(pixels, labels, 64, 0, range(steps)))  # without the label
    return ema, [float(loss) for _, loss, _ in train(denoiser, ema, choose(denoiser), batches, steps)]


def adamw(parameters, max_lr):
    return torch.optim.AdamW(parameters, max_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


@lesson1.section
def show_training():
    (images, _), (unseen, name) = load_images("train", 2000), load_images("test", 100)
    losses, corner = {}, unseen[:, :, :3, :3]
    print("   sigma       " + "".join(f"{sigma:7g}" for sigma in LEVELS))
    for label, kind in {"without time": UntimedUNet, "with time": TimeUNet}.items():
        ema, _ = train_small(kind, images, lambda denoiser: [adamw(denoiser.parameters(), 0.004)])
        losses[label] = loss_by_level(ema, unseen)
        print(f"   {label:12}" + "".join(f"{value:7.3f}" for value in losses[label]))
    sigmas = torch.tensor(LEVELS).view(-1, 1, 1, 1, 1)
    seen = ema.scales(sigmas)[2] * (corner + sigmas * torch.randn_like(corner))  # levels n c 3 3
    print("   corner says " + "".join(f"{value:7.3f}" for value in seen.std(dim=(2, 3, 4)).mean(dim=1)))
    figure, axes = plt.subplots(figsize=(8, 4))
    label = f"loss on test images ({name})"
    lesson1.plot_lines(axes, LEVELS, losses, xscale="log", ylim=0, xlabel="sigma", ylabel=label)
    change = np.mean(losses["with time"]) / np.mean(losses["without time"]) - 1
    figure.suptitle(f"Told the time, the loss changes by {change:+.1%}: an image itself shows how noisy it is")
    return figure


# %% 10. Sampling: one step by hand, then all
# From pure noise, in small steps, towards what a denoiser says. At first it says much the same for every noise:
# something like the mean of all garments. A step goes a part of the way there, until as much noise is left as the next
# sigma says. The less noise there is, the more of a garment the denoiser sees in x, until x has become one.
STEPS = 14  # with more, fewer paths end wrong (section 11), but samples are no better (docs/measurements.md)


def noise_levels(steps=STEPS, rho=7):
    """`steps` values from SIGMA_MAX to SIGMA_MIN, denser towards the small ones, and then 0 (Karras et al. 2022,
    equation 5)."""
    ramp = np.linspace(SIGMA_MAX ** (1 / rho), SIGMA_MIN ** (1 / rho), steps)
    return [*(ramp**rho).tolist(), 0.0]


def starting_noise(seed, label, index, shape):
    """The noise that image `index` of a class begins with, float32 of that shape: a function of these numbers alone."""
    return torch.from_numpy(np.random.default_rng((seed, label, index)).standard_normal(shape, np.float32))


@torch.no_grad()
def sample(denoise, noise, sigmas, method="dpm++"):
    """Yield each state (sigma, x, x0_hat) on the way from noise to images; the last has sigma 0 and x = x0_hat.

    denoise(x, sigma) -> x0_hat, with sigma `(n,)` on the CPU (reading it waits for no GPU). noise: `(n, c, h, w)`,
    unit variance. sigmas: falling, from `noise_levels`. method: what a step assumes on its way to the next sigma,
    "ddim":  that x0_hat stays as it is (notebook 28's; Song, Meng and Ermon 2021). Error ~ 1 / steps.
    "dpm++": that x0_hat goes on as since the last step, linearly in ln(sigma) (Lu et al. 2022, DPM-Solver++(2M)). Error
             ~ 1 / steps², for the same one evaluation a step.
    "heun":  that dx / dsigma is the mean of its values at both ends (Karras et al. 2022, algorithm 1). Error
             ~ 1 / steps², for two evaluations a step.
    The last step, from the smallest sigma to 0, is DDIM's for all three.
    """
    if method not in ("ddim", "dpm++", "heun"):
        raise ValueError(f"method must be ddim, dpm++ or heun, got {method!r}")
    x = noise * sigmas[0]
    x0_last = length_last = None  # of the step before: its x0_hat, and its length in ln(sigma)
    for sigma, sigma_next in pairwise(sigmas):
        x0_hat = denoise(x, torch.full((len(x),), sigma, dtype=x.dtype))
        yield sigma, x, x0_hat
        ratio = sigma_next / sigma
        target = x0_hat
        if sigma_next > 0 and method == "dpm++":
            length = -math.log(ratio)
            if x0_last is not None:
                target = x0_hat + length / (2 * length_last) * (x0_hat - x0_last)  # as it will be halfway
            x0_last, length_last = x0_hat, length
        if sigma_next > 0 and method == "heun":
            guess = x0_hat + ratio * (x - x0_hat)
            slope = (x - x0_hat) / sigma
            slope_next = (guess - denoise(guess, torch.full((len(x),), sigma_next, dtype=x.dtype))) / sigma_next
            x = x + (sigma_next - sigma) * (slope + slope_next) / 2
        else:
            x = target + ratio * (x - target)
    yield 0.0, x, x


# A network has to be trained before it can sample. But for a given set of images the best denoiser can be written down:
# x may have been each of them, with a probability that falls with the distance, and the mean of what it may have been
# is the best guess. It is attention (lesson 2): x is the query, the images are keys and values, and the scores are
# minus squared distances. It knows its images by heart and makes nothing else. Our network makes new ones, as far from
# all training images as test images are (docs/measurements.md).
def ideal_denoiser(images):
    """denoise(x, sigma) for `sample`, which knows images `(m, c, h, w)`: the mean of those that x may have been."""

    def denoise(x, sigma):
        squared = torch.cdist(x.flatten(1), images.flatten(1)) ** 2  # n m
        weights = (-squared / (2 * sigma[:, None] ** 2)).softmax(dim=1)  # n m: Bayes' rule
        return (weights @ images.flatten(1)).view_as(x)  # n (c h w) -> n c h w

    return denoise


def spread(images):
    """How far images `(n, ...)` differ: the standard deviation of a pixel among them; root mean square of all."""
    return float(images.var(dim=0).mean().sqrt())


def plot_film(title, states):
    """A film strip of `sample`'s states: x (scaled to be seen), and the expected x0 below it."""
    frames = [states[round(i)] for i in np.linspace(0, len(states) - 1, min(10, len(states)))]
    strips = []
    for image in range(len(frames[0][1])):
        strips += [x[image] / max(1.0, x[image].std().item()) for _, x, _ in frames]
        strips += [x0_hat[image] for _, _, x0_hat in frames]
    rows, titles = ["x", "x0_hat"] * len(frames[0][1]), [f"σ = {sigma:.2g}" for sigma, _, _ in frames]
    return lesson1.plot_grid(title, torch.stack(strips), len(frames), rows, titles)


@lesson1.section
def show_sampling():
    images, name = load_images("train", 1000)
    denoise, sigmas = ideal_denoiser(images), noise_levels()
    noise = torch.stack([starting_noise(0, 0, index, (1, 28, 28)) for index in range(4)])
    x = sigmas[0] * noise  # n c h w: nothing but noise
    x0_hat = denoise(x, torch.full((4,), sigmas[0]))  # n c h w
    x_next = x0_hat + sigmas[1] / sigmas[0] * (x - x0_hat)  # n c h w: the noise is smaller, its direction is the same
    states = list(sample(denoise, noise, sigmas))
    print(f"   sigma {sigmas[0]:.1f} to {sigmas[1]:.1f}: deviation of x {x.std():.1f} to {x_next.std():.1f}")
    print(f"   by hand or by sample, largest difference: {(x_next - states[1][1]).abs().max():g}")
    print("      sigma   deviation of x   of x0_hat   of x0_hat between the four images")
    for sigma, x, x0_hat in states[::3]:
        print(f"   {sigma:8.3f}{x.std():17.2f}{x0_hat.std():12.2f}{spread(x0_hat):36.2f}")
    early, late = spread(states[0][2]), spread(states[-1][2])
    return plot_film(f"Four expected garments differ by {early:.2f} at first, {late:.2f} at the end ({name})", states)


# %% 11. Few steps or many
# The path from noise to a garment is a curve, and DDIM's step follows its tangent. So the more steps, the nearer we
# come to where the path leads. A method that also looks back at the step before, as DPM-Solver++(2M) does, follows the
# bend, and is as near after fewer steps. Where the path leads, we take from 400 steps of a third method, Heun's. With
# the ideal denoiser each path ends on one of its images; so what we count is how many of 100 end on a wrong one.
@lesson1.section
def show_few_steps():
    images, name = load_images("train", 1000)
    noise = torch.stack([starting_noise(0, 0, index, (1, 28, 28)) for index in range(100)])
    counts, wrong = (3, 6, STEPS, 24, 48), {"ddim": [], "dpm++": []}
    *_, (_, ends, _) = sample(ideal_denoiser(images), noise, noise_levels(400), "heun")  # x of the last state
    print("   steps  " + "".join(f"{steps:8}" for steps in counts))
    for method, values in wrong.items():
        for steps in counts:
            *_, (_, x, _) = sample(ideal_denoiser(images), noise, noise_levels(steps), method)
            values.append(int(((x - ends).abs().amax(dim=(1, 2, 3)) > 0.1).sum()))
        print(f"   {method:7}" + "".join(f"{value:8}" for value in values))
    figure, axes = plt.subplots(figsize=(8, 3.8))
    lesson1.plot_lines(axes, counts, wrong, xlabel="steps", ylabel="of 100 end on a wrong garment", ylim=0)
    ddim, dpm = (values[counts.index(STEPS)] for values in wrong.values())
    figure.suptitle(f"After {STEPS} steps of DDIM {ddim} of 100 end on a wrong garment, of dpm++ {dpm} ({name})")
    return figure


# %% 12. Not in the lecture: Muon, the optimiser of the convolutions
# The gradient of a matrix is mostly made of a few directions, and the other ones hardly learn. Muon (Jordan et al.
# 2024) takes the momentum, a mean of the last gradients, and makes the step equally large in all directions: all
# singular values about 1. A convolution's weights are a matrix as well: the output channels by all that each of them
# looks at. In the picture's 120 steps it is far ahead; after five minutes, in single runs, samples were no better than
# chance would explain (docs/measurements.md).
#
# The singular values are not computed. A polynomial of the matrix, X <- (a + b G + c G²) X with G = X Xᵀ, moves each
# singular value s to a s + b s³ + c s⁵, and five such steps bring all but the smallest to about 1. As G has only
# as many rows as X, the steps are done on G, and X is multiplied once, at the end. (A tall X has the smaller G = Xᵀ X.)
def orthogonalize(matrices):
    """Matrices `(rows, columns)` with all singular values moved to about 1 (0.68 to 1.21 where they were at least
    0.0015 of the matrix's norm); a list. matrices: float32, the shorter side of all is the same."""
    matrices = [x / (x.norm() + 1e-7) for x in matrices]
    gram = torch.stack([x @ x.mT if len(x) <= x.shape[1] else x.mT @ x for x in matrices])  # n side side
    identity = product = torch.eye(gram.shape[1], device=gram.device)
    for _ in range(5):
        polynomial = 3.4445 * identity - 4.775 * gram + 2.0315 * gram @ gram
        product, gram = polynomial @ product, polynomial @ polynomial @ gram
    return [p @ x if len(x) == len(p) else x @ p for p, x in zip(product, matrices, strict=True)]


class Muon(torch.optim.Optimizer):
    """For convolutions' weights `(o, i, h, w)`, each taken as a matrix `(o, i h w)`. Those whose shorter side is the
    same go together."""

    def __init__(self, weights, lr, momentum=0.95, weight_decay=0.001):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        group, by_side = self.param_groups[0], {}
        for weight in group["params"]:
            if not self.state[weight]:
                self.state[weight]["mean"] = torch.zeros_like(weight)
            mean = self.state[weight]["mean"]
            mean.lerp_(weight.grad, 1 - group["momentum"])
            ahead = weight.grad.lerp(mean, group["momentum"]).flatten(1)  # Nesterov's momentum: one step ahead
            by_side.setdefault(min(ahead.shape), []).append((weight, ahead))
        for pairs in by_side.values():
            weights, matrices = zip(*pairs, strict=True)
            for weight, step in zip(weights, orthogonalize(matrices), strict=True):
                lr = group["lr"] * max(1, len(step) / step.shape[1]) ** 0.5  # a tall one's rows come out shorter
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(lr * step.view(weight.shape))


def make_optimizers(denoiser, max_lr):
    """Muon for the convolutions, AdamW for everything else; max_lr: AdamW's highest learning rate."""
    convolutions = [parameter for parameter in denoiser.parameters() if parameter.ndim == 4]
    others = [parameter for parameter in denoiser.parameters() if parameter.ndim != 4]
    return [Muon(convolutions, 10 * max_lr), adamw(others, max_lr)]  # AdamW's steps have entries of 1, Muon's far below


@lesson1.section
def show_muon():
    images, name = load_images("train", 2000)
    torch.manual_seed(0)
    x = torch.randn(48, 12) @ torch.diag(torch.logspace(0, -2, 12)) @ torch.randn(12, 432)  # few large directions
    for label, matrix in {"before": x / x.norm(), "after": orthogonalize([x])[0]}.items():
        values = torch.linalg.svdvals(matrix)[:12].tolist()
        print(f"   singular values {label}:", *(f"{value:.3f}" for value in values))
    choices = {"AdamW": lambda d: [adamw(d.parameters(), 0.004)], "Muon and AdamW": lambda d: make_optimizers(d, 0.004)}
    curves = {label: train_small(TimeUNet, images, choice)[1] for label, choice in choices.items()}
    said = ", ".join(f"{np.mean(losses[-20:]):.2f} with {label}" for label, losses in curves.items())
    figure, axes = plt.subplots(figsize=(8, 3.8))
    lesson1.plot_lines(axes, range(120), curves, xlabel="step of training", ylabel="loss", ylim=(0, 1.1))
    figure.suptitle(f"Loss at the end: {said} ({name})")
    return figure


# %% The run: what is trained
class Preset(NamedTuple):
    widths: tuple[int, ...]  # channels of each level
    depth: int  # residual blocks a level
    groups: int  # of the group norms; with fewer than 16 channels in each, bfloat16 is several times as slow on a CPU
    patch: int  # side of the patches that the denoiser turns into channels
    attention_levels: tuple[int, ...]  # in lesson 4
    head_dim: int  # channels of a head there
    batch_size: int
    max_lr: float  # AdamW's highest learning rate for that batch size
    epochs: float


PRESETS = {
    # widths, depth, groups, patch, attention_levels, head_dim, batch_size, max_lr, epochs
    "small": Preset((48, 96), 1, 3, 2, (1,), 32, 32, 7e-4, 3),
    "lecture": Preset((32, 64, 128, 256), 2, 2, 1, (1, 2, 3), 8, 256, 2e-3, 25),
}


class Run(NamedTuple):
    """What was asked for, and on which data. A checkpoint of a run that differs in it is refused."""

    network: str  # its class
    preset: str
    epochs: float
    batch_size: int
    seed: int
    data: str  # the data set's name
    images: int  # how many
    classes: tuple[str, ...]
    size: tuple[int, int]  # height and width of the images
    sigma_data: float

    @property
    def steps(self):
        return max(1, round(self.epochs * self.images / self.batch_size))

    @property
    def title(self):
        return f"{self.data}, {self.network}, {self.preset}, {self.epochs:g} epoch{'s' * (self.epochs != 1)}"


class Model(NamedTuple):
    """What a run has to know of a network."""

    network: type  # its class
    arguments: Callable = lambda preset, n_classes: ()  # of its constructor, after those of UNet
    tell: Callable = lambda label, n_classes: ()  # what it is told of the labels `(n,)` in training, a tuple

    def build(self, preset, n_classes):
        """A new network."""
        of_unet = preset.patch**2, preset.widths, preset.depth, preset.groups
        return self.network(*of_unet, *self.arguments(preset, n_classes))


PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # more than one under torchrun


class UserError(Exception):
    """Something that the user can mend; the message is one line that says how."""


def choose_device(name):
    """The torch.device for --device. Raises UserError where it isn't there."""
    mps = torch.backends.mps.is_available() and PROCESSES == 1  # DistributedDataParallel can't use it
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    available = [device for device in there if there[device]]
    if name not in ("auto", *available):
        raise UserError(f"--device {name}: there is none here, only {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def choose_precision(device):
    """bfloat16 where the processor has instructions for it (elsewhere it is imitated, and slow); otherwise None."""
    instructions = torch.cpu.get_capabilities()
    fast = device.type == "cpu" and (instructions.get("amx_bf16") or instructions.get("avx512_bf16"))
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else None


def make_denoiser(run, model, device):
    """The new denoiser of a `Run`, with weights that its seed decides."""
    torch.manual_seed(run.seed)
    preset = PRESETS[run.preset]
    network = model.build(preset, len(run.classes))
    denoiser = Denoiser(network, run.sigma_data, preset.patch, choose_precision(device))
    return denoiser.to(device, memory_format=torch.channels_last)  # the order in which convolutions are fastest


def pad(images, preset):
    """Zeros, the background of uint8 images, around `(n, c, h, w)`: as few as make the sizes divisible as the network
    needs it."""
    unit = preset.patch * 2 ** (len(preset.widths) - 1)
    bottom, right = (-size % unit for size in images.shape[2:])
    return F.pad(images, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))


def crop(images, size):
    """The inverse of `pad`: the middle of `(n, c, h, w)`, of that size."""
    top, left = ((padded - wanted) // 2 for padded, wanted in zip(images.shape[2:], size, strict=True))
    return images[:, :, top : top + size[0], left : left + size[1]]


# %% The run: its checkpoint
def save_checkpoint(path, content):
    """All or nothing: an interrupted write leaves the old file as it was."""
    lesson1.write(path, functools.partial(torch.save, content))


def load_checkpoint(path, **asked):
    """The checkpoint's content, or None where there is none. asked: fields of `Run` that it must agree with.

    Raises UserError where it is damaged, something else, or of another run.
    """
    if not path.exists():
        return None
    try:
        file = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(file) as archive:  # torch.load checks no sums, and reads zeros where a flag says "folder"
            if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                raise ValueError("a checksum is wrong")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        run = Run(**content["run"])
        if run.preset not in PRESETS or not {"step", "ema"} <= content.keys():
            raise ValueError("of another version")
    except Exception as error:  # of many kinds: whatever reading strange bytes can lead to
        raise UserError(f"{path}: damaged, or not a checkpoint of this lesson; to train anew: --restart") from error
    there = run._asdict()
    differing = [f"{name} {there[name]} there, {asked[name]} here" for name in asked if there[name] != asked[name]]
    if differing:
        raise UserError(
            f"{path}: of another run ({', '.join(differing)}); to train anew: --restart, or another --out DIR"
        )
    return content | {"run": run}


def restore(checkpoint, path, **parts):
    """Load the state of each part by its name. Raises UserError where one doesn't fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not of today's preset, or of another version; to train anew: --restart") from error


def load_trained(path, model, device, **asked):
    """The averaged denoiser in a checkpoint, and its `Run`. Raises UserError where there is none that was asked for."""
    checkpoint = load_checkpoint(path, network=model.network.__name__, **asked)
    if checkpoint is None:
        raise UserError(f"{path}: no checkpoint there to sample from; train first, without --sample-only")
    run = checkpoint["run"]
    ema = make_denoiser(run, model, device)
    restore(checkpoint, path, ema=ema)
    print(f"network   {run.title}, after {checkpoint['step']:,} of {run.steps:,} steps")
    return ema.eval().requires_grad_(False), run


# %% The run: training
# `torchrun` starts this script several times. Each process draws the numbers of the whole batch, computes on its share,
# and steps with the mean of all gradients (DistributedDataParallel), so all keep the same weights. All must see the
# same folder; the first process alone prints, and writes files.
def join_processes(device, found):
    """Work with the other processes from now on. found: what all of them must agree on. Raises UserError where they
    don't, or where there are too few GPUs."""
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()  # of this machine
        if local >= gpus:
            raise UserError(f"there are more processes than GPUs, of which there are {gpus} here")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")  # left out, it is that of the machine's GPU
    all_found = [None] * PROCESSES
    dist.all_gather_object(all_found, found)
    if all_found.count(found) < PROCESSES:
        raise UserError("the processes found different data or checkpoints: see --data, --data-dir and --out")


def get_denoiser(options, model, path):
    """The averaged denoiser that the options ask for, and its `Run`: from the checkpoint at `path`, or trained now.

    Raises UserError or DataError where something is missing or doesn't fit; SystemExit where training was interrupted.
    """
    device = choose_device(options.device)
    if options.sample_only:
        typed = {name: getattr(options, name) for name in ("preset", "epochs", "batch_size") if getattr(options, name)}
        return load_trained(path, model, device, **typed)
    preset_name = options.preset or ("lecture" if device.type == "cuda" else "small")
    preset = PRESETS[preset_name]
    batch_size = options.batch_size or preset.batch_size
    if batch_size % PROCESSES:
        raise UserError(f"--batch-size {batch_size}: must be a multiple of {PROCESSES}, the number of processes")
    train_set = load_once(split="train", **DATA)
    images, labels = pad(torch.from_numpy(train_set.images)[:, None], preset), torch.from_numpy(train_set.labels)
    sigma_data = round(images.float().std().item() / 127.5, 4)  # on another machine the last digits might differ
    if not sigma_data:
        raise UserError(f"{train_set.name}: all images are one and the same grey, there is nothing to learn")
    training = {"epochs": options.epochs or preset.epochs, "batch_size": batch_size, "seed": options.seed}
    of_data = {"data": train_set.name, "images": len(images), "classes": train_set.classes}
    size = train_set.images.shape[1:]
    run = Run(model.network.__name__, preset_name, **training, **of_data, size=size, sigma_data=sigma_data)
    checkpoint = None if options.restart else load_checkpoint(path, **run._asdict())
    done = checkpoint["step"] if checkpoint else 0
    if PROCESSES > 1:
        join_processes(device, (run, done))
    print(f"data      {run.data}: {run.images:,} images, {run.size[0]} × {run.size[1]}, {len(run.classes)} classes")
    if done == run.steps:
        print("training  finished in an earlier run; --restart trains anew")
    else:
        fit(run, model, (images.to(device), labels.to(device)), path, checkpoint)
    if PROCESSES > 1:
        dist.destroy_process_group()
    if RANK:
        sys.exit()  # the first process goes on alone
    return load_trained(path, model, device)


def begin(run, model, device, path, checkpoint):
    """What training changes, by the names that it has in a checkpoint; the number of steps done; the loss of each
    step, NaN for those to come."""
    preset = PRESETS[run.preset]
    denoiser = make_denoiser(run, model, device)
    max_lr = preset.max_lr * (run.batch_size / preset.batch_size) ** 0.5  # gradients are noisy by 1 / sqrt(batch_size)
    parts = {"denoiser": denoiser, "ema": copy.deepcopy(denoiser)}
    parts["muon"], parts["adamw"] = make_optimizers(denoiser, max_lr)
    done, losses = 0, torch.full((run.steps,), math.nan)
    if checkpoint:
        restore(checkpoint, path, **parts)
        done, losses = checkpoint["step"], checkpoint["losses"]
    print(f"network   {run.network}, preset {run.preset}: {sum(p.numel() for p in denoiser.parameters()):,} parameters")
    print(f"device    {PROCESSES} × {device.type}, {'bfloat16' if denoiser.precision else 'float32'}")
    print(f"training  {run.steps:,} steps of {run.batch_size} images" + (f", from step {done:,}" if done else ""))
    return parts, done, losses.to(device)


def fit(run, model, dataset, path, checkpoint):
    """Train, or go on from a checkpoint, under a progress bar; save every two minutes, at the end, and when stopped.

    dataset: images and labels, as in `draw_batches`.
    """
    device = dataset[0].device
    parts, done, losses = begin(run, model, device, path, checkpoint)
    denoiser, ema, *optimizers = parts.values()  # the optimizers: Muon and AdamW
    network = DistributedDataParallel(denoiser.network) if PROCESSES > 1 else denoiser.network
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        network = torch.compile(network)  # a few large kernels instead of many small ones
    # the same weights; `denoiser` has them under their plain names, for the checkpoint and the average
    trained = Denoiser(network, run.sigma_data, denoiser.patch, denoiser.precision)

    def batches(steps):
        n = run.batch_size // PROCESSES
        share = slice(RANK * n, (RANK + 1) * n)
        for step, *batch, label in draw_batches(*dataset, run.batch_size, run.seed, steps):
            yield step, *(part[share] for part in (*batch, *model.tell(label, len(run.classes))))

    def request_stop(number, frame):
        stops.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C now stops at once

    stops = []  # the signals that came
    kinds = (signal.SIGINT, signal.SIGTERM) if PROCESSES == 1 else ()  # several would not stop at the same step
    handlers = {kind: signal.signal(kind, request_stop) for kind in kinds}
    total, begun, saved = run.steps * run.batch_size, done * run.batch_size, time.monotonic()
    bar = tqdm(total=total, initial=begun, unit=" images", unit_scale=True, dynamic_ncols=True, disable=RANK > 0)
    try:
        for step, loss, norm in train(trained, ema, optimizers, batches(range(done, run.steps)), run.steps):
            if PROCESSES > 1:
                dist.all_reduce(loss)
            losses[step], done = loss / PROCESSES, step + 1
            due = bool(stops) or done == run.steps or time.monotonic() > saved + 120
            if due or done % 20 == 0 or device.type == "cpu":  # elsewhere seldom, because it waits for the GPU
                if not norm.isfinite():  # of the gradients: the same in all processes
                    tip = "try --restart with another --batch-size or --seed (the last checkpoint is from before)"
                    raise UserError(f"the loss is not finite any more at step {done:,}: {tip}")
                bar.set_postfix(loss=f"{losses[max(0, done - 20) : done].mean().item():.3f}", refresh=False)
            bar.update(run.batch_size)
            if due:
                saved = time.monotonic()
                kept = parts if done < run.steps else {"ema": ema}  # a finished run only samples
                content = {"run": run._asdict(), "step": done, "losses": losses}
                if RANK == 0:
                    save_checkpoint(path, content | {name: part.state_dict() for name, part in kept.items()})
            if stops and due:  # one that came after `due` was decided waits for the next step, which is saved
                break
    finally:
        bar.close()
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
    print(f"wrote {path}")
    if done == run.steps and RANK == 0:
        lesson1.save_picture(plot_losses(f"{run.title}: the loss", losses.cpu().numpy()), path.with_name("loss.png"))
    if stops:
        again = shlex.join(["python", *(argument for argument in sys.argv if argument != "--restart")])
        print(f"stopped after step {done:,} of {run.steps:,}. To go on:\n{again}")
        sys.exit(130)


def plot_losses(title, losses):
    """The loss of each step, and its mean over 2 % of the steps."""
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(losses, color="0.8", linewidth=0.7)
    axes.plot(range(window - 1, len(losses)), smooth, color="black")
    axes.set(xlabel="step", ylabel=f"loss; black: mean of {window} steps", ylim=(0, min(1.1, 1.1 * losses.max())))
    axes.set_title(title)
    return figure


# %% The run: samples
def draw_noise(run, starts, device):
    """Starting noise `(n, 1, h, w)` of the padded size of a run's images; starts: (seed, label, index) of each."""
    shape = pad(torch.empty(1, 1, *run.size), PRESETS[run.preset]).shape[1:]
    return torch.stack([starting_noise(*start, shape) for start in starts]).to(device)


def sample_images(run, starts, make_denoise, sampler, device):
    """An image, `(n, 1, h, w)` in [-1, 1], for each of `starts`, (seed, label, index); and a film of some of them, a
    list of (sigma, x, x0_hat).

    make_denoise(label): what `sample` needs for images of these labels `(n,)`. sampler(denoise, noise): `sample`.
    """
    images, film = [], []
    for first in range(0, len(starts), 200):
        chosen = starts[first : first + 200]
        denoise = make_denoise(torch.tensor([label for _, label, _ in chosen], device=device))
        shown = np.linspace(0, len(chosen) - 1, min(len(chosen), 4)).round().astype(int)
        states = sampler(denoise, draw_noise(run, chosen, device))
        for sigma, x, x0_hat in tqdm(states, desc="sampling", unit=" steps", leave=False, disable=None):
            if first == 0:
                film.append((sigma, *(crop(part[shown], run.size).cpu() for part in (x, x0_hat))))
        images.append(crop(x, run.size).clamp(-1, 1).cpu())
    return torch.cat(images), film


def write_samples(out, title, samples, rows=(), columns=10):
    """samples.png, samples.npy and denoising.png, to the folder out. samples: of `sample_images`."""
    images, film = samples
    lesson1.save_picture(lesson1.plot_grid(title, images, columns, rows), out / "samples.png")
    lesson1.save_picture(plot_film(f"{title}: from noise to garment", film), out / "denoising.png")
    lesson1.write(out / "samples.npy", lambda file: np.save(file, images.numpy()))
    print(f"wrote {out / 'samples.npy'}")


# %% The command
def number(kind, low, high):
    """For argparse: parse a number from low to high."""

    def number(text):  # by its name argparse calls what can't be parsed: "invalid number value"
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, got {text}")
        return kind(text)

    return number


def make_run_parser(script, description, n):
    """The options that lessons 3 and 4 share, and the group of those that exclude each other. n: images to sample."""
    parser = lesson1.make_parser(script, description)
    add, count = parser.add_argument, number(int, 1, 10**6)
    add("--data", choices=data.NAMES, default="auto", help="(%(default)s: garments where Fashion-MNIST can't be had)")
    add("--data-dir", metavar="DIR", help="of IDX files, or of a folder of pictures a class; also $FASHION_MNIST_DIR")
    add("--preset", choices=PRESETS, help="network and settings (lecture on CUDA, small elsewhere)")
    add("--epochs", metavar="E", type=number(float, 1e-9, 1e5), help="may be a fraction (preset's)")
    add("--batch-size", metavar="B", type=count, help="images a training step (preset's)")
    add("--seed", metavar="S", type=number(int, 0, 2**63), default=0, help="(%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s: the fastest there is)")
    add("--show", action="store_true", help="print and draw what the sections say, to lesson/ in --out; don't train")
    add("--n", metavar="N", type=count, default=n, help="images to sample; of each class, if there are (%(default)s)")
    add("--steps", metavar="S", type=count, default=STEPS, help="steps to a sample (%(default)s)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--restart", action="store_true", help="train anew, whatever checkpoint is there")
    group.add_argument("--sample-only", action="store_true", help="sample from the checkpoint: no training, no data")
    return parser, group


def start(parser, options, work):
    """Do the work; what the user can mend is one line and exit status 2."""
    if RANK:
        sys.stdout = io.StringIO()
    DATA.update(name=options.data, data_dir=options.data_dir)
    try:
        if not (RANK and (options.show or options.sample_only)):
            work(options)
    except (UserError, data.DataError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def work(options):
    if options.show:
        lesson1.run_sections(globals(), options.out / "lesson")
        return
    model = Model(UntimedUNet if options.no_time else TimeUNet)
    denoiser, run = get_denoiser(options, model, options.out / "checkpoint.pt")
    starts = [(options.seed, 0, index) for index in range(options.n)]
    sampler = functools.partial(sample, sigmas=noise_levels(options.steps))
    samples = sample_images(run, starts, lambda label: denoiser, sampler, denoiser.device)
    write_samples(options.out, f"{run.title}, {options.steps} steps", samples)


def main():
    parser, _ = make_run_parser(__file__, __doc__, n=100)
    parser.add_argument("--no-time", action="store_true", help="the first U-Net, which isn't told the time")
    start(parser, parser.parse_args(), work)


if __name__ == "__main__" and not hasattr(sys, "ps1"):
    main()
