"""Lesson 3: a U-Net learns to take noise away, and so to draw garments.

First the network without time, built in small steps; then noise and time; then what it is trained to do, and how
samples come out of it (lecture sections "U-Net" and "unconditional model"; notebook 26).

    python 03_unet_uncond.py [--no-time] [--epochs E] [--help]   trains the unconditional model and draws from it
    python 03_unet_uncond.py --show                              prints and draws what the sections say, in two minutes
"""

# %% What this lesson needs
import argparse
import copy
import functools
import importlib
import io
import math
import os
import pickle
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import NAMES, DataError, load

lesson1 = importlib.import_module("01_time_embedding")
NotTrained = lesson1.NotTrained
Parser = lesson1.Parser
noise_to_time = lesson1.noise_to_time
plot_images = lesson1.plot_images
plot_lines = lesson1.plot_lines
save_images = lesson1.save_images
save_picture = lesson1.save_picture
timestep_embedding = lesson1.timestep_embedding

lesson = lesson1.Lesson("03_unet_uncond.py", __name__ == "__main__")
load_once = functools.cache(load)


def load_garments(split, n):
    """The first n garments, float32 `(n, 1, 28, 28)` in [-1, 1], and the data set's name."""
    data = load_once(lesson.options.data, split, lesson.options.data_dir)
    return F.interpolate(torch.from_numpy(data.images[:n])[:, None] / 127.5 - 1, size=(28, 28)), data.name


# %% 1. A convolution comes after its norm and its activation
# A signal must come through all layers of a network: forwards, or the last ones don't know what the picture was, and
# backwards, or the first ones don't learn. A shortcut, x + ..., lets it pass; but an activation *behind* the sum, as in
# the lecture's first residual blocks, bends it again, block after block. Put norm and activation in front of each
# convolution, and what leaves a block is a plain sum.
#
# The same layers in both orders; x is `(n, c, h, w)` all the way:
def activate_last(x, convs, norms):
    """He et al. 2015, "Deep Residual Learning"."""
    h = F.silu(norms[0](convs[0](x)))
    return F.silu(x + norms[1](convs[1](h)))


def activate_first(x, convs, norms):
    """He et al. 2016, "Identity Mappings in Deep Residual Networks"."""
    h = convs[0](F.silu(norms[0](x)))
    return x + convs[1](F.silu(norms[1](h)))


def signal_through(block, x, blocks=20):
    """x `(n, c, h, w)` and the activations after each block, new ones of 16 channels; and by what factor the norm of a
    random gradient grows on its way back through all of them."""
    torch.manual_seed(0)
    states = [x.detach().clone().requires_grad_()]
    for _ in range(blocks):
        convs = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)]
        norms = [nn.GroupNorm(4, 16) for _ in range(2)]
        states.append(block(states[-1], convs, norms))
    gradient = torch.randn_like(x)
    (arrived,) = torch.autograd.grad(states[-1], states[0], gradient)
    return [state.detach() for state in states], float(arrived.norm() / gradient.norm())


def correlation(a, b):
    """Of two tensors `(n, c, h, w)`, each channel's mean taken off: 1 is the same picture, 0 is nothing in common."""
    a, b = (tensor - tensor.mean(dim=(0, 2, 3), keepdim=True) for tensor in (a, b))
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@lesson
def show_order(out):
    """1. A convolution comes after its norm and its activation: a signal through 20 blocks"""
    garments, name = load_garments("test", 32)
    torch.manual_seed(0)
    x = nn.Conv2d(1, 16, 3, padding=1)(garments).detach()  # n c h w
    shown, pictures, left = (0, 1, 2, 5, 10, 20), [], {}
    for order in (activate_first, activate_last):
        label = order.__name__.replace("_", " ")
        states, growth = signal_through(order, x / x.std())
        left[label] = [correlation(state, x) for state in states]
        print(f"   {label}: correlation with what went in {left[label][-1]:.2f}, gradient {growth:.1f} times as large")
        pictures += [states[i][0, :1] / (2 * states[i][0, 0].abs().mean()) for i in shown]  # one channel, 1 h w
    figure, (above, below) = plt.subplots(2, figsize=(8, 6), height_ratios=[2, 3])
    plot_lines(above, range(21), left, xlabel="blocks", ylabel="correlation", xticks=range(0, 21, 5))
    plot_images(below, torch.stack(pictures).clamp(-1, 1), len(shown), left, [f"after {i}" for i in shown])
    first, last = (values[-1] for values in left.values())
    figure.suptitle(
        f"After 20 blocks the signal is left at {first:.2f} if activations come first, {last:.2f} if last ({name})"
    )
    save_picture(figure, out / "01_order.png")


# %% 2. The residual block
# So norm, activation and convolution are one layer, in this order.
class PreActConv(nn.Module):
    """GroupNorm, SiLU, 3×3 convolution.

    Group norm (Wu and He 2018) treats each image alone. Batch norm, which the lecture uses, shares its statistics among
    the images of a batch, and these will have different noise levels: what one is told depends on how noisy others are.
    """

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x):
        """`(n, in_channels, h, w)` -> `(n, out_channels, h, w)`."""
        return self.conv(F.silu(self.norm(x)))


def zero_(layer):
    """Set a layer's weights and bias to zero, in place: the branch it ends starts silent. Returns the layer."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# What two convolutions find is added to what came in. The last one starts at zero, so a new block changes nothing: the
# network begins as a short one, and each block joins in when it has learned something.
class ResBlock(nn.Module):
    """Two pre-activation convolutions and a shortcut, which is a 1×1 convolution where the width changes."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.conv1 = PreActConv(in_channels, out_channels, groups)
        self.conv2 = PreActConv(out_channels, out_channels, groups)
        zero_(self.conv2.conv)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, embedding=None):
        """`(n, in_channels, h, w)` -> `(n, out_channels, h, w)`. The embedding is for the blocks of section 8."""
        return self.shortcut(x) + self.conv2(self.conv1(x))


def change_by_others(norm, x):
    """By how much of its size a norm's output for the first image changes if the others of the batch get noisier."""
    noisier = torch.cat([x[:1], x[1:] + 3 * torch.randn_like(x[1:])])
    before, after = norm(x)[0], norm(noisier)[0]
    return float(((after - before).norm() / before.norm()).detach())


@lesson
def show_block(out):
    """2. The residual block"""
    torch.manual_seed(0)
    x = torch.randn(8, 16, 14, 14)
    wider = ResBlock(16, 32, groups=4)
    h = wider.conv1(x)
    steps = {"x": x, "conv1": h, "conv2": wider.conv2(h), "shortcut(x)": wider.shortcut(x), "sum": wider(x)}
    print("   " + ", ".join(f"{name} {tuple(step.shape)}" for name, step in steps.items()))
    print(f"   a new block of the same width changes its input by {(ResBlock(16, 16, 4)(x) - x).abs().max():g}")
    for name, norm in {"batch": nn.BatchNorm2d(16), "group": nn.GroupNorm(4, 16)}.items():
        change = change_by_others(norm, x)
        print(f"   {name} norm, and the other images get noisier: this one's activations change by {change:.0%}")


# %% 3. Saved: the up path will need what the down path computed
# A class that keeps what it returns, whatever it computes. It computes nothing itself: `super().forward` is the next
# `forward` in the order in which Python searches the class's ancestors. So `Saved` must be mixed in *front* of a module
# class; behind it, the module's `forward` is found first, and `Saved` is never asked.
#
# (Why not a list of activations? The lecture's down path is an `nn.Sequential`, where nobody stands by to collect them.
# In a loop of our own a list would do; the saved modules keep the path readable, and lesson 4 mixes them in again.)
class Saved:
    """A module that keeps its output until the up path takes it."""

    saved = None

    def forward(self, *inputs):
        self.saved = super().forward(*inputs)
        return self.saved

    def take(self):
        """The saved output, which is forgotten here: no activation outlives the forward pass that made it."""
        saved, self.saved = self.saved, None
        return saved


class SavedResBlock(Saved, ResBlock):
    pass


class SavedConv(Saved, nn.Conv2d):
    pass


class MixedInBehind(nn.Conv2d, Saved):
    """What not to do."""


@lesson
def show_saved(out):
    """3. Saved: where Python looks for forward, and what is saved"""
    for kind in (SavedConv, MixedInBehind):
        conv, x = kind(1, 4, 3), torch.randn(2, 1, 8, 8)
        order = " -> ".join(parent.__name__ for parent in kind.__mro__[:3])
        same, saved = torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias)), conv.take()
        what = "nothing" if saved is None else tuple(saved.shape)
        print(f"   {order}: runs {kind.forward.__qualname__}; is a convolution: {same}; has saved {what}")


# %% 4. The U-Net (Ronneberger et al. 2015)
# Down: blocks, and convolutions of stride 2, which halve height and width; so a 3×3 convolution sees ever more of the
# garment. A level has a quarter of the pixels of the one above and twice the channels, so its convolutions cost about
# the same. Up: the same the other way. Beside what comes from below, each block there gets what was saved at its size
# on the way down, as more channels; one block more, because a level saves one activation more than it has blocks.
def upsample(width):
    """Twice the height and width: each pixel four times, then a 3×3 convolution to smooth the steps."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1))


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
        width, last = widths[0], len(widths) - 1
        self.conv_in = SavedConv(channels, width, 3, padding=1)
        skips = [width]

        self.down = nn.ModuleList()
        for level, new_width in enumerate(widths):  # one turn is the lecture's down_block
            for _ in range(depth):
                self.down.append(self.block(level, width, new_width, saved=True))
                width = new_width
                skips.append(width)
            if level < last:
                self.down.append(SavedConv(width, width, 3, stride=2, padding=1))
                skips.append(width)

        self.middle = nn.ModuleList([self.block("middle", width, width), self.block(None, width, width)])

        self.up = nn.ModuleList()
        for level, new_width in reversed(list(enumerate(widths))):  # and its up_block
            for _ in range(depth + 1):
                self.up.append(self.block(level, width + skips.pop(), new_width))
                width = new_width
            if level > 0:
                self.up.append(upsample(width))

        self.conv_out = PreActConv(width, channels, groups)
        zero_(self.conv_out.conv)

    def block(self, place, in_channels, out_channels, saved=False):
        """A residual block for a place: a level's number, "middle" or None, which is the second block there."""
        return (SavedResBlock if saved else ResBlock)(in_channels, out_channels, self.groups)

    def embed(self, time, label):
        """What each block is told beside its activations: here, nothing."""

    def forward(self, x, time=None, label=None):
        """x and the result: `(n, channels, height, width)`; time `(n,)` float and label `(n,)` int64, where they are
        used. Raises ValueError where height or width can't be halved once for each level but the first."""
        step = 2 ** (len(self.widths) - 1)
        if x.shape[2] % step or x.shape[3] % step:
            raise ValueError(f"height and width must be multiples of {step}, got {x.shape[2]} × {x.shape[3]}")
        embedding = self.embed(time, label)
        try:
            h = self.conv_in(x)  # n widths[0] height width
            for layer in self.down:
                h = layer(h, embedding) if isinstance(layer, ResBlock) else layer(h)
        finally:  # also where memory ran out on the way
            skips = [layer.take() for layer in (self.conv_in, *self.down)]
        for layer in self.middle:  # n widths[-1] height/step width/step
            h = layer(h, embedding)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = torch.cat([h, skips.pop()], dim=1)  # n (c skip) h w
                h = layer(h, embedding)  # n c h w
            else:
                h = layer(h)  # n c 2h 2w
        return self.conv_out(h)  # n channels height width

    # What training (section 9) and a run (section 11) ask of a network:
    def training_label(self, label, generator):
        """The labels to train with, made of the right ones, `(n,)`. None: this network takes no label."""

    @classmethod
    def from_preset(cls, preset, n_classes):
        """The network for a `Preset`."""
        return cls(preset.patch**2, preset.widths, preset.depth, preset.groups)


def measure_layers(network, x):
    """For each layer on x's way through a U-Net: its name, its output's shape, its parameters, its multiply-adds."""
    parts = {"conv_in": network.conv_in, "conv_out": network.conv_out}
    for path in ("down", "middle", "up"):
        parts |= {f"{path}.{i}": layer for i, layer in enumerate(getattr(network, path))}
    rows = []

    def note(name, layer, y):
        sizes = [parameter.numel() for parameter in layer.parameters()]
        weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 4)
        rows.append((name, tuple(y.shape[1:]), sum(sizes), weights * y[0, 0].numel()))  # each is used at each pixel

    for name, layer in parts.items():
        layer.register_forward_hook(lambda layer, inputs, y, name=name: note(name, layer, y))
    network(x)
    return rows


@lesson
def show_layers(out):
    """4. The U-Net, layer by layer, for one image of 28 × 28 pixels, padded to 32 × 32"""
    network = UNet(1, (32, 64, 128, 256), depth=2, groups=2)  # the lecture's size
    rows = measure_layers(network, torch.zeros(1, 1, 32, 32))
    print("                           c    h    w    parameters   multiply-adds")
    for name, shape, *counts in rows:
        kind = type(network.get_submodule(name)).__name__.replace("Sequential", "upsample")
        print("   {:9}{:14}{:5}{:5}{:5}{:14,}{:16,}".format(name, kind, *shape, *counts))
    totals = np.array([counts for _, _, *counts in rows])
    for height in (32, 16, 8, 4):
        share = totals[[shape[1] == height for _, shape, *_ in rows]].sum(axis=0) / totals.sum(axis=0)
        print("   at {0:2} × {0:2}: {1:.0%} of the parameters, {2:.0%} of the operations".format(height, *share))


# %% 5. What the skips are for
# At the bottom of the U, where a garment is 7 × 7 pixels here, there's room for what it is, but not for where its edges
# run.
# The skips bring this back. To see it, we cut them: every saved activation arrives as zeros. Both nets have the same
# parameters, start from the same ones, and are to take away one and the same strength of noise.
def cut_skips(network):
    for layer in network.modules():
        if isinstance(layer, Saved):  # whatever it takes arrives as zeros
            layer.take = lambda take=layer.take: torch.zeros_like(take())


def train_skips(cut, images, steps=100, batch_size=32, peak=0.01):
    """A small U-Net trained to take noise of strength 0.5 from images `(n, 1, h, w)`, and its loss at each step."""
    torch.manual_seed(0)
    network = UNet(1, (8, 16, 32), depth=1, groups=4)
    if cut:
        cut_skips(network)
    optimizer = torch.optim.AdamW(network.parameters())
    losses = []
    for step in range(steps):
        x0 = images[torch.randint(len(images), (batch_size,))]
        loss = F.mse_loss(network(x0 + 0.5 * torch.randn_like(x0)), x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
    return network.requires_grad_(False), losses


@lesson
def show_skips(out):
    """5. What the skips are for: a small U-Net with and without them, each trained for 100 steps"""
    images, name = load_garments("train", 512)
    garments, _ = load_garments("test", 8)
    torch.manual_seed(1)
    noisy = garments + 0.5 * torch.randn_like(garments)
    rows, curves, errors = {"garment": garments, "with noise": noisy}, {}, {}
    for row, cut in {"with skips": False, "skips cut": True}.items():
        network, curves[row] = train_skips(cut, images)
        rows[row] = network(noisy)
        errors[row] = float(F.mse_loss(rows[row], garments))
        late = np.mean(curves[row][-20:])
        print(f"   {row}: loss {late:.3f} in the last 20 steps, {errors[row]:.3f} on {len(garments)} test garments")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), width_ratios=(2, 3))
    plot_lines(
        left, range(len(curves[row])), curves, xlabel="step of training", ylabel="mean squared error", ylim=(0, 0.4)
    )
    plot_images(right, torch.cat(list(rows.values())), 8, rows)
    ratio = errors["skips cut"] / errors["with skips"]
    figure.suptitle(f"Without skips {ratio:.1f} times the error: edges are lost ({name})")
    save_picture(figure, out / "05_skips.png")


# %% 6. Noise: x = x0 + sigma · noise
# From now on there is noise of every strength. sigma says how strong; pixels go from -1 to 1. Noise of 0.02 can't be
# seen; at 80 nothing but noise can (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
# Models", EDM; the lecture's notebook 26). Taking noise away is easy at one end and hopeless at the other. In between
# it is drawing: where the noise hides a garment's edge, whoever takes the noise away must invent it.
def add_noise(x0, sigma, noise):
    """`(n, c, h, w)` and noise levels `(n,)` -> `(n, c, h, w)`; the noise has variance one."""
    return x0 + sigma.view(-1, 1, 1, 1) * noise


@lesson
def show_noise(out):
    """6. Noise: one garment at ten levels, and its correlation with the garment that it was"""
    garments, name = load_garments("test", 1)
    torch.manual_seed(0)
    sigmas = torch.logspace(math.log10(0.02), math.log10(80), 10)
    x = add_noise(garments, sigmas, torch.randn(10, *garments.shape[1:]))
    alike = [correlation(picture[None], garments) for picture in x]
    for sigma, picture, share in zip(sigmas, x, alike, strict=True):
        print(
            f"   sigma {sigma:6.2f}: pixels from {picture.min():7.1f} to {picture.max():6.1f}, correlation {share:5.2f}"
        )
    figure, axes = plt.subplots(2, 5, figsize=(8, 4))
    for axis, sigma, picture, share in zip(axes.flat, sigmas, x, alike, strict=True):
        axis.imshow(picture[0].numpy())
        axis.set(xticks=[], yticks=[], title=f"σ = {sigma:.2g}\ncorrelation {share:.2f}")
    figure.suptitle(f"A garment under more and more noise, each picture on its own scale ({name})")
    save_picture(figure, out / "06_noise.png")


# %% 7. The denoiser: c_in, c_skip and c_out
# Two things would make learning hard. The deviation of x is 0.7 at one end and 80 at the other, and a network likes its
# input to be of one size. And x0, asked for directly, is the wrong question at both ends: at low noise, x is the answer
# but for a little, and a network that has to repeat its input adds errors of its own.
#
# c_in scales x to variance one, whatever sigma is. c_skip lets x itself through, as far as it can be believed: nearly
# all of it at low noise, nothing at high. c_out scales what the network adds, and its target has variance one, too: at
# low noise it is minus the noise, at high noise the garment, in between a mix. (c_skip is chosen so that c_out, by
# which the network's errors are multiplied, is as small as it can be.)
#
# "time" is how noisy x is, as lesson 1 has it. UNet takes no notice of it; section 8 mends that. And the work can be
# done on patches: 2×2 pixels become 4 channels of one pixel, so that the network has a quarter of the pixels to go
# over.
class Denoiser(nn.Module):
    """A network with EDM's preconditioning (Karras et al. 2022, table 1): the network's input and its target both have
    variance one at every noise level, whatever the scale of x.

    network:    a UNet for images of `channels · patch²` channels.
    sigma_data: standard deviation of the training images.
    patch:      side of the patches that become channels before the network, and pixels again after it.
    precision:  the network computes in this type (autocast) if given; everything around it stays as it is.
    """

    def __init__(self, network, sigma_data, patch=1, precision=None):
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.patch = patch
        self.precision = precision

    @property
    def device(self):
        return next(self.network.parameters()).device

    def scales(self, sigma):
        """c_skip, c_out and c_in of each sigma."""
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()

    def forward(self, x, sigma, label=None):
        """x: noisy images `(n, c, h, w)`; sigma: `(n,)`, positive; label: `(n,)` or None. Returns x0_hat like x."""
        c_skip, c_out, c_in = self.scales(sigma.view(-1, 1, 1, 1))
        time = noise_to_time(sigma)  # n
        with torch.autocast(x.device.type, self.precision, enabled=self.precision is not None):
            h = F.pixel_unshuffle(c_in * x, self.patch)  # n (c patch patch) h/patch w/patch
            h = self.network(h, time, label)
        return c_skip * x + c_out * F.pixel_shuffle(h.to(x.dtype), self.patch)


@lesson
def show_scales(out):
    """7. The denoiser: what goes into the network, and what it is to say, at each noise level"""
    garments, _ = load_garments("test", 500)
    torch.manual_seed(0)
    noise = torch.randn_like(garments)
    denoiser = Denoiser(None, sigma_data=float(garments.std()))
    print(f"   sigma_data {denoiser.sigma_data:.3f}")
    print("     sigma   c_skip    c_out     c_in    deviation of x    of c_in x    of the target")
    sigmas = torch.tensor([0.02, 0.1, 0.5, 2, 10, 80])
    for sigma in sigmas:
        c_skip, c_out, c_in = denoiser.scales(sigma)
        x = garments + sigma * noise
        deviations = x.std(), (c_in * x).std(), ((garments - c_skip * x) / c_out).std()
        print(f"   {sigma:7.2f}{c_skip:9.4f}{c_out:9.4f}{c_in:9.4f}" + "{:18.2f}{:13.2f}{:17.2f}".format(*deviations))
    sigmas = torch.logspace(-2, 2, 200)
    curves = dict(
        zip(("c_skip: how much of x is kept", "c_out: how much is added", "c_in"), denoiser.scales(sigmas), strict=True)
    )
    figure, axes = plt.subplots(figsize=(8, 3.8))
    plot_lines(axes, sigmas, curves, xscale="log", xlabel="sigma", ylabel="factor")
    axes.axvline(denoiser.sigma_data, color="0.8", zorder=0)
    axes.text(denoiser.sigma_data * 1.05, 1.4, "sigma = sigma_data")
    figure.suptitle("At low noise x is kept, at high noise the network draws it all")
    save_picture(figure, out / "07_scales.png")


# %% 8. Time
# c_in has made every x equally large, so the network can't tell by its size how noisy it is. Each block is told: lesson
# 1's embedding of the time goes through two layers that all blocks share, and each block turns it into a scale and a
# shift for each of its channels. They act *after* the second norm; in front of it, as in the lecture, a group norm
# would take out again what is common to a group.
class TimeResBlock(ResBlock):
    """A residual block that takes activations and the embedding."""

    def __init__(self, in_channels, out_channels, groups, embedding_dim):
        super().__init__(in_channels, out_channels, groups)
        self.scale_shift = nn.Linear(embedding_dim, 2 * out_channels)

    def forward(self, x, embedding):
        """x: `(n, in_channels, h, w)`, embedding: `(n, embedding_dim)`. Returns `(n, out_channels, h, w)`."""
        scale, shift = self.scale_shift(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)  # n out_channels 1 1, each
        h = self.conv2.norm(self.conv1(x))  # n out_channels h w
        h = (1 + scale) * h + shift
        return self.shortcut(x) + self.conv2.conv(F.silu(h))


class SavedTimeResBlock(Saved, TimeResBlock):
    pass


class TimeUNet(UNet):
    """The U-Net with time (the arguments are UNet's)."""

    def __init__(self, channels, widths, depth, groups):
        self.embedding_dim = 4 * widths[0]  # before super().__init__(), which builds the blocks
        super().__init__(channels, widths, depth, groups)
        self.embed_time = nn.Sequential(
            nn.Linear(widths[0], self.embedding_dim),
            nn.SiLU(),
            nn.Linear(self.embedding_dim, self.embedding_dim),
        )

    def block(self, place, in_channels, out_channels, saved=False):
        block = SavedTimeResBlock if saved else TimeResBlock
        return block(in_channels, out_channels, self.groups, self.embedding_dim)

    def embed(self, time, label):
        """The embedding, `(n, embedding_dim)`. Raises ValueError where time isn't `(n,)`."""
        return self.embed_time(timestep_embedding(time, self.widths[0]))


@lesson
def show_time(out):
    """8. Time: what the blocks are told"""
    torch.manual_seed(0)
    x, norm = torch.randn(4, 16, 14, 14), nn.GroupNorm(4, 16)
    before, after = (norm(3 * x + 1) - norm(x)).abs().mean(), (3 * norm(x) + 1 - norm(x)).abs().mean()
    print(f"   all channels times 3, plus 1: in front of the norm a change of {before:.0e}, after it of {after:.1f}")
    for kind in (UNet, TimeUNet):
        print(f"   {kind.__name__}: {sum(p.numel() for p in kind(1, (16, 32), 1, 4).parameters()):,} parameters")
    sigmas = torch.tensor([0.02, 0.1, 0.5, 2, 10, 80])
    print("   sigma" + "".join(f"{sigma:8g}" for sigma in sigmas))
    print("   time " + "".join(f"{time:8.0f}" for time in noise_to_time(sigmas)) + "   (pictures: lesson 1, section 3)")


# %% 9. Training
# Pick garments at random, a noise level and noise for each, and let the denoiser say what the garments were.
def denoising_loss(denoiser, x0, sigma, noise, label=None):
    """The squared error of x0_hat, weighted by 1 / c_out² (Karras et al. 2022, equation 8). Returns `(n,)`.

    What is left is the plain squared error of the network's own output, so that no sigma outweighs the others. A new
    network, which says 0, has a loss of 1 at low noise, and of 1 + (mean / sigma_data)² of the images at high noise.
    """
    x0_hat = denoiser(add_noise(x0, sigma, noise), sigma, label)
    _, c_out, _ = denoiser.scales(sigma)
    return (x0_hat - x0).square().mean(dim=(1, 2, 3)) / c_out**2


P_MEAN, P_STD = lesson1.LOG_SIGMA  # of ln(sigma): most training is where there's most to learn, at 0.1 to 1


def draw_batch(images, labels, batch_size, seed, step, training_label, share=slice(None)):
    """The step's x0, sigma, noise and label: on one kind of device a function of seed and step, so that a resumed run
    sees the same. share: the part of the batch to return; each of several processes has its own."""
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])  # similar pairs, unrelated seeds
    generator = torch.Generator(images.device).manual_seed(mixed)
    on_device = {"generator": generator, "device": images.device}
    chosen = torch.randint(len(images), (batch_size,), **on_device)
    x0 = images[chosen].float() / 127.5 - 1
    sigma = (P_MEAN + P_STD * torch.randn(batch_size, **on_device)).exp()
    noise = torch.randn(x0.shape, **on_device)
    batch = x0, sigma, noise, training_label(labels[chosen], generator)
    return [part if part is None else part[share] for part in batch]


# The gradient of a matrix is mostly made of a few directions, and the other ones hardly learn. Muon takes its momentum
# and makes the step equally large in all directions (all singular values about 1). A convolution's weights are a matrix
# as well: the output channels by all that each of them looks at.
class ConvMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) for convolutions' weights `(o, i, h, w)`, each taken as a matrix `(o, i h w)`."""

    def __init__(self, weights, **settings):
        self.weights = list(weights)
        super().__init__([nn.Parameter(torch.empty_like(weight.flatten(1))) for weight in self.weights], **settings)

    @torch.no_grad()
    def step(self):
        pairs = list(zip(self.param_groups[0]["params"], self.weights, strict=True))
        for matrix, weight in pairs:
            matrix.copy_(weight.flatten(1))
            matrix.grad = weight.grad.flatten(1)
        super().step()
        for matrix, weight in pairs:
            weight.copy_(matrix.view_as(weight))


def make_optimizers(denoiser, peak):
    """Muon for the convolutions, AdamW for everything else; peak: AdamW's highest learning rate."""
    convolutions = [parameter for parameter in denoiser.parameters() if parameter.ndim == 4]
    others = [parameter for parameter in denoiser.parameters() if parameter.ndim != 4]
    return [
        ConvMuon(convolutions, lr=10 * peak, weight_decay=0.001),
        torch.optim.AdamW(others, peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


def schedule(step, steps):
    """The share of the highest learning rate: up over the first 5 % of the steps, then straight down to zero."""
    warm_up = max(1, round(0.05 * steps))
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


# A few early gradients are huge, and warm-up and clipping keep them from throwing the weights off. And the latest
# weights jump about, while their mean doesn't: it is the mean that will draw.
def train(denoiser, average, optimizers, images, labels, start, steps, batch_size, seed, share=slice(None)):
    """Train from step `start` to `steps`, and yield (step, loss) after each, the loss as a tensor on the device.

    images: uint8 `(n, c, h, w)`, labels: int64 `(n,)`, both on the device. average: a copy of the denoiser, which
    becomes the moving average of its weights. share: as in draw_batch.
    """
    training_label = denoiser.network.training_label
    for step in range(start, steps):
        x0, sigma, noise, label = draw_batch(images, labels, batch_size, seed, step, training_label, share)
        loss = denoising_loss(denoiser, x0, sigma, noise, label).mean()
        denoiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * schedule(step, steps)
            optimizer.step()
        update_average(average, denoiser, step)
        yield step, loss.detach()


@torch.no_grad()
def update_average(average, denoiser, step):
    """Move the average towards the weights: it looks back over about a tenth of the steps so far, however many (an
    exponential moving average, EMA, whose window grows; Karras et al. 2024)."""
    slow, fast = list(average.parameters()), list(denoiser.parameters())
    torch._foreach_lerp_(slow, fast, min(1.0, 10 / (step + 1)))  # on a GPU in a few kernels, not one for each tensor


# How much does time help? An image shows by itself how noisy it is, unlike the single pixel of lesson 1. So we may
# expect little; the two small nets below tell. (c_in, c_skip and c_out know sigma for both: it's the network that isn't
# told.) Few of the levels they are trained at are near the ends of the scale.
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


@torch.no_grad()
def loss_by_level(denoiser, images, levels=LEVELS):
    """The mean loss on images `(n, c, h, w)` at each noise level, always with the same noise: `(levels,)`."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return [float(denoising_loss(denoiser, images, torch.full((len(images),), s), noise).mean()) for s in levels]


def train_small(network_class, images, steps=120):
    """A small denoiser, trained on `(n, 1, h, w)` in [-1, 1] with the same batches and noise whatever the class."""
    torch.manual_seed(0)
    denoiser = Denoiser(network_class(4, (16, 32), depth=1, groups=4), float(images.std()), patch=2)
    average = copy.deepcopy(denoiser)
    optimizers = make_optimizers(denoiser, peak=0.004)
    pictures, labels = ((images + 1) * 127.5).round().byte(), torch.zeros(len(images), dtype=torch.int64)
    for _ in train(denoiser, average, optimizers, pictures, labels, 0, steps, batch_size=64, seed=0):
        pass
    return average


@lesson
def show_levels(out):
    """9. Training: the loss at each noise level, of two small nets trained for 120 steps, one told the time"""
    images, _ = load_garments("train", 2000)
    garments, name = load_garments("test", 100)
    kinds = {"without time": UNet, "with time": TimeUNet}
    losses = {label: loss_by_level(train_small(kind, images), garments) for label, kind in kinds.items()}
    print("   sigma       " + "".join(f"{sigma:7g}" for sigma in LEVELS) + "   mean")
    for label, values in losses.items():
        print(f"   {label:12}" + "".join(f"{value:7.3f}" for value in values) + f"{np.mean(values):7.3f}")
    gains = [1 - told / untold for untold, told in zip(*losses.values(), strict=True)]
    most, least = int(np.argmax(gains)), int(np.argmin(gains))
    summary = f"Told the time, the loss changes by {-gains[most]:+.0%} at sigma {LEVELS[most]:g}"
    summary += f", but by {-gains[least]:+.0%} at {LEVELS[least]:g}"
    print(f"   {summary}")
    figure, axes = plt.subplots(figsize=(8, 4))
    plot_lines(axes, LEVELS, losses, xscale="log", ylim=0, xlabel="sigma", ylabel=f"loss on test images ({name})")
    figure.suptitle(summary)
    save_picture(figure, out / "09_levels.png")


# %% 10. Sampling
# From pure noise, in small steps, towards what the denoiser says. At first it says much the same for every noise:
# something like the mean of all garments. A step goes a part of the way there, until as much noise is left as the next
# sigma says. The less noise there is, the more of a garment the denoiser sees in x, until x has become one.
SIGMA_MIN, SIGMA_MAX = lesson1.SIGMA_RANGE  # noise that can hardly be seen, and noise in which nothing can be seen


def noise_levels(steps, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=7):
    """`steps + 1` values from sigma_max to sigma_min, denser towards the small ones, and then 0 (Karras et al. 2022,
    equation 5)."""
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps)
    return [*(ramp**rho).tolist(), 0.0]


def starting_noise(seed, label, index, shape):
    """The noise that image `index` of a class begins with, float32 of that shape: a function of these numbers alone."""
    return torch.from_numpy(np.random.default_rng((seed, label, index)).standard_normal(shape, np.float32))


@torch.no_grad()
def sample(denoise, noise, sigmas, method="dpm++"):
    """Yield each state (sigma, x, x0_hat) on the way from noise to images; the last has sigma 0 and x = x0_hat.

    denoise(x, sigma) -> x0_hat, with sigma `(n,)`. noise: `(n, c, h, w)`, unit variance. sigmas: falling, from
    `noise_levels`. method: what a step assumes on its way to the next sigma,
    "ddim":  that x0_hat stays as it is (Song, Meng and Ermon 2021; Euler's method in sigma). Error ~ 1 / steps.
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
        x0_hat = denoise(x, x.new_full((len(x),), sigma))
        yield sigma, x, x0_hat
        ratio = sigma_next / sigma
        target = x0_hat
        if sigma_next > 0 and method == "dpm++":
            length = -math.log(ratio)
            if x0_last is not None:
                target = x0_hat + length / (2 * length_last) * (x0_hat - x0_last)
            x0_last, length_last = x0_hat, length
        if sigma_next > 0 and method == "heun":
            guess = x0_hat + ratio * (x - x0_hat)
            slope = (x - x0_hat) / sigma
            slope_next = (guess - denoise(guess, x.new_full((len(x),), sigma_next))) / sigma_next
            x = x + (sigma_next - sigma) * (slope + slope_next) / 2
        else:
            x = target + ratio * (x - target)
    yield 0.0, x, x


# %% 11. What is trained: a run and its checkpoint
class Preset(NamedTuple):
    widths: tuple[int, ...]  # channels of each level
    depth: int  # residual blocks a level
    groups: int  # of the group norms; with fewer than 16 channels in each, bfloat16 is several times as slow on a CPU
    patch: int  # side of the patches that the denoiser turns into channels
    attention_levels: tuple[int, ...]  # in lesson 4
    head_dim: int  # channels of a head there
    batch_size: int
    peak: float  # learning rate for that batch size, AdamW's
    epochs: float


PRESETS = {
    "small": Preset((48, 96), 1, 3, 2, (1,), 32, 64, 2e-3, 3),
    "lecture": Preset((32, 64, 128, 256), 2, 2, 1, (1, 2, 3), 8, 256, 2e-3, 25),
}


class Run(NamedTuple):
    """All that the trained weights depend on."""

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


class UserError(Exception):
    """Something that the user can mend; the message is one line that says how."""


def choose_precision(device):
    """bfloat16 where the processor has instructions for it and is several times as fast with it; otherwise None."""
    capabilities = torch.cpu.get_capabilities()
    fast = {
        "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"),
    }
    return torch.bfloat16 if fast.get(device.type) else None


def make_denoiser(run, network_class, device, weights=None):
    """The denoiser of a `Run`, with these weights (a state_dict) or new ones that its seed decides. Raises UserError
    where the weights don't fit."""
    torch.manual_seed(run.seed)
    preset = PRESETS[run.preset]
    network = network_class.from_preset(preset, len(run.classes))
    denoiser = Denoiser(network, run.sigma_data, preset.patch, choose_precision(device))
    try:
        if weights:
            denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the checkpoint isn't of today's preset {run.preset!r}; --restart trains anew") from error
    return denoiser.to(device, memory_format=torch.channels_last)  # the order in which convolutions are fastest


def save_checkpoint(path, content):
    """All or nothing: an interrupted write leaves the old file as it was."""
    part = path.with_suffix(".part")
    torch.save(content, part)
    part.replace(path)


def find_checkpoint(options):
    """Where the checkpoint is: in --out, or what came with the scripts."""
    pretrained = getattr(options, "pretrained", False)
    return lesson1.HERE / "data" / "pretrained" / "cond.pt" if pretrained else options.out / "checkpoint.pt"


def load_checkpoint(path):
    """The checkpoint's content, or None where there is none. Raises UserError where it can't be read."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {**content, "run": Run(**content["run"]), "step": content["step"], "average": content["average"]}
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: damaged, or not a checkpoint of this lesson; --restart replaces it") from error


def choose_device(name):
    """The torch.device for --device. Raises UserError where it isn't there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device in there if there[device]]
    if name != "auto" and name not in available:
        raise UserError(f"--device {name}: there is none here, only {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def pad(images, preset):
    """Background around `(n, c, h, w)`, as little as makes the sizes divisible as the network needs it."""
    unit = preset.patch * 2 ** (len(preset.widths) - 1)
    bottom, right = (-size % unit for size in images.shape[2:])
    return F.pad(images, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))


def crop(images, size):
    """The inverse of `pad`: the middle of `(n, c, h, w)`, of that size."""
    top, left = ((padded - wanted) // 2 for padded, wanted in zip(images.shape[2:], size, strict=True))
    return images[:, :, top : top + size[0], left : left + size[1]]


# %% 12. Sampling: one step by hand, then all
# Small nets that are trained for seconds don't draw. So the last sections ask the network that a run has trained.
def load_trained(lesson, *network_classes):
    """The denoiser in the checkpoint of the lesson's --out, and its `Run`. Raises NotTrained where there is none of
    these classes."""
    kinds = {network_class.__name__: network_class for network_class in network_classes}
    checkpoint = load_checkpoint(find_checkpoint(lesson.options))
    if not checkpoint or checkpoint["run"].network not in kinds:
        command = f"python {lesson.script} --out {lesson.options.out}"
        raise NotTrained(f"for want of a trained network: {command} trains one")
    run = checkpoint["run"]
    denoiser = make_denoiser(run, kinds[run.network], choose_device(str(lesson.options.device)), checkpoint["average"])
    print(f"   {run.title}, {checkpoint['step']:,} of {run.steps:,} steps")
    return denoiser.eval().requires_grad_(False), run


def draw_noise(run, device, starts):
    """Starting noise `(n, 1, h, w)` of the padded size of a run's images; starts: (seed, label, index) of each."""
    shape = pad(torch.empty(1, 1, *run.size), PRESETS[run.preset]).shape[1:]  # 1 h w
    return torch.stack([starting_noise(*start, shape) for start in starts]).to(device)


def spread(images):
    """How far images `(n, ...)` differ: the standard deviation of a pixel among them, on average over the pixels."""
    return float(images.var(dim=0).mean().sqrt())


def save_film(path, title, states, shown=4, columns=10):
    """A film strip of `sample`'s states: what the sampler holds (scaled to be seen), and what x0 it expects, below."""
    frames = [states[round(i)] for i in np.linspace(0, len(states) - 1, min(columns, len(states)))]
    strips = []
    for image in range(min(shown, len(frames[0][1]))):
        strips += [x[image] / max(1.0, x[image].std().item()) for _, x, _ in frames]
        strips += [x0_hat[image] for _, _, x0_hat in frames]
    rows = ["x", "x0_hat"] * (len(strips) // len(frames) // 2)
    save_images(path, title, torch.stack(strips), len(frames), rows, [f"σ = {sigma:.2g}" for sigma, _, _ in frames])


@lesson
def show_sampling(out):
    """12. Sampling: one step by hand, then all"""
    denoiser, run = load_trained(lesson, UNet, TimeUNet)
    noise = draw_noise(run, denoiser.device, [(0, 0, index) for index in range(4)])
    sigmas = noise_levels(18)
    x = sigmas[0] * noise  # n c h w: nothing but noise
    x0_hat = denoiser(x, torch.full((4,), sigmas[0], device=x.device))  # n c h w: something like the mean garment
    x_next = x0_hat + sigmas[1] / sigmas[0] * (x - x0_hat)  # n c h w: the noise is smaller, its direction is the same
    states = list(sample(denoiser, noise, sigmas))
    print(f"   sigma {sigmas[0]:.1f} to {sigmas[1]:.1f}: deviation of x {x.std():.1f} to {x_next.std():.1f}")
    print(f"   by hand or by sample, largest difference: {(x_next - states[1][1]).abs().max():g}")
    print("      sigma   deviation of x   of x0_hat   of x0_hat between the four images")
    for sigma, x, x0_hat in states[::3]:
        print(f"   {sigma:8.3f}{x.std():17.2f}{x0_hat.std():12.2f}{spread(x0_hat):36.2f}")
    early, late = spread(states[0][2]), spread(states[-1][2])
    title = f"The four expected garments differ by {early:.2f} at first, by {late:.2f} at the end ({run.data})"
    film = [(sigma, *(crop(part, run.size).cpu() for part in state)) for sigma, *state in states]
    save_film(out / "12_sampling.png", title, film)


# %% 13. Few steps or many
# The path from noise to a garment is a curve, and DDIM's step follows its tangent. So the more steps, the nearer we
# come to where the path leads. A method that also looks back at the step before, as DPM-Solver++(2M) does, follows the
# bend, and is as near after fewer steps. Where the path leads, we take from 100 steps of a third method, Heun's.
@lesson
def show_few_steps(out):
    """13. Few steps or many, DDIM or DPM-Solver++(2M): distance from the end of the path"""
    denoiser, run = load_trained(lesson, UNet, TimeUNet)
    noise = draw_noise(run, denoiser.device, [(0, 0, index) for index in range(6)])
    counts, ends = (3, 6, 12, 18, 36), {}  # ends: n 1 h w for each method and number of steps
    for method, steps in [("heun", 100), *((method, steps) for method in ("ddim", "dpm++") for steps in counts)]:
        *_, (_, x, _) = sample(denoiser, noise, noise_levels(steps), method)
        ends[method, steps] = crop(x, run.size).cpu()
    off = {
        method: [float(F.mse_loss(ends[method, steps], ends["heun", 100]).sqrt()) for steps in counts]
        for method in ("ddim", "dpm++")
    }
    print("   steps  " + "".join(f"{steps:8}" for steps in counts))
    for method, values in off.items():
        print(f"   {method:7}" + "".join(f"{value:8.3f}" for value in values))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.2), width_ratios=(2, 3))
    plot_lines(left, counts, off, xlabel="steps", ylabel="distance from the path's end", ylim=0, xticks=counts)
    rows = {f"{method}, {steps}": ends[method, steps] for method, steps in ends if steps in (6, 18, 100)}
    plot_images(right, torch.cat(list(rows.values())), 6, rows)
    ratio = off["ddim"][counts.index(18)] / off["dpm++"][counts.index(18)]
    figure.suptitle(f"With 18 steps DDIM is {ratio:.1f} times as far from the end of the path as dpm++ ({run.data})")
    save_picture(figure, out / "13_few_steps.png")


# %% Machinery: several processes
# `torchrun` starts this script several times, and tells each process which one it is. All have the same weights. Each
# draws the numbers of the whole batch, computes on its share, and steps with the mean of all gradients, so the weights
# stay the same. The first process alone prints, and writes files.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # among those of the same machine
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def join():
    """Wait until all processes are here, if there are several."""
    if PROCESSES > 1 and not dist.is_initialized():
        dist.init_process_group()


class Spokesman(Parser):
    """A command line whose errors come once: what is wrong for one process is wrong for all. The first one says it and
    ends, and torchrun then ends the others, which are still waiting for it."""

    def exit(self, status=0, message=None):
        if status == 2 and LOCAL_RANK:
            join()
        super().exit(status, message)


def take_part(device, batch_size):
    """Take a GPU of one's own. Raises UserError where there are too few, or where the batch has no equal shares."""
    if batch_size % PROCESSES:
        raise UserError(f"--batch-size {batch_size}: must be a multiple of {PROCESSES}, the number of processes")
    if device.type == "mps" and PROCESSES > 1:
        raise UserError("--device mps: takes one process only; several need --device cpu or cuda")
    if device.type == "cuda":
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > there:
            raise UserError(f"--device cuda: there are {there} GPUs here, too few for {here} processes")
        torch.cuda.set_device(LOCAL_RANK)


def leave():
    """The first process goes on alone, the others have done their part."""
    if PROCESSES > 1:
        dist.destroy_process_group()
    if RANK:
        raise SystemExit


def from_first(run, checkpoint):
    """The run and the checkpoint of the first process, whose file others may not see. Raises UserError where this
    process would make another run."""
    first = [run, checkpoint]
    if PROCESSES > 1:
        dist.broadcast_object_list(first)
    if first[0] != run._replace(sigma_data=first[0].sigma_data):  # which may differ in its last digit
        raise UserError(f"process {RANK} has other options or data ({run.title}) than the first ({first[0].title})")
    return first


class Replica(nn.parallel.DistributedDataParallel):
    """The denoiser in one of several processes: a backward pass leaves the mean of all gradients in each of them. Each
    part is sent as soon as it is there, while the backward pass goes on."""

    def __getattr__(self, name):  # what the loss asks of a denoiser
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def agree(loss, requests):
    """The mean of all processes' losses, and whether any was asked to stop: all must stop after the same step."""
    if PROCESSES == 1:
        return loss, requests
    both = torch.stack([loss, torch.full_like(loss, len(requests))])
    dist.all_reduce(both)
    return both[0] / PROCESSES, both[1]


# %% Machinery: the command line
def number(kind, least, accepted):
    """For argparse: parse a finite number from `least` up; anything else gets an error that says what is accepted."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {accepted}, got {text!r}")
        return value

    return parse


def make_parser(script, description):
    """The options that lessons 3 and 4 share."""
    count = number(int, 1, "a whole number from 1 up")
    parser = Spokesman(script, description)
    add = parser.add_argument
    add("--data", choices=NAMES, default="auto", help="(%(default)s: garments where Fashion-MNIST can't be had)")
    add("--data-dir", metavar="DIR", help="folder with the four IDX files, also $FASHION_MNIST_DIR")
    add("--preset", choices=PRESETS, help="network and settings (lecture on CUDA, small elsewhere)")
    add("--epochs", metavar="E", type=number(float, 1e-9, "a number above 0"), help="may be a fraction (preset's)")
    add("--batch-size", metavar="B", type=count, help="images a training step (preset's)")
    add("--seed", metavar="S", type=number(int, 0, "a whole number from 0 up"), default=0, help="(%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s: the fastest there is)")
    add("--restart", action="store_true", help="train anew, whatever checkpoint is there")
    add("--sample-only", action="store_true", help="draw from the checkpoint, don't train")
    add("--show", action="store_true", help="print and draw what the sections say, to lesson/ in --out; don't train")
    add(
        "--n",
        metavar="N",
        type=count,
        help="images to draw; in lesson 4 of each class, unless --class names one (%(default)s)",
    )
    add("--steps", metavar="S", type=count, default=18, help="network evaluations for a sample (%(default)s)")
    return parser


def start(parser, main, lesson):
    """Parse the command line, and call main(options) or show the lesson; what the user can mend is one line and exit
    status 2."""
    if RANK:
        sys.stdout = io.StringIO()
    options = parser.parse_args()
    try:
        options.device = choose_device(options.device)
        if RANK and (options.show or options.sample_only):
            return
        if options.show:
            lesson.options = options
            for show in lesson.shows:
                lesson.run(show)
        else:
            main(options)
    except (UserError, DataError) as error:
        parser.error(str(error))
    except RuntimeError as error:
        if PROCESSES == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        sys.exit(
            f"{parser.prog}: process {RANK} ends, because another one is gone: torchrun says which. The same command "
            "goes on from the last checkpoint (one is written every two minutes)"
        )
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


@contextmanager
def stop_requests():
    """A list of the signals that came: Ctrl-C or SIGTERM asks to stop after a step, a second one stops at once."""
    requests = []

    def request(signal_number, frame):
        requests.append(signal_number)
        if PROCESSES == 1:  # otherwise a second one is torchrun's, which passes the first one on
            signal.signal(signal_number, signal.default_int_handler)

    before = {kind: signal.signal(kind, request) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


# %% Machinery: a run from beginning to end
def check_same(path, run, asked):
    """Raise UserError where the checkpoint's run isn't the one that is asked for (a dictionary of `Run`'s fields)."""
    there = run._asdict()
    differing = [f"{name} {there[name]} there, {asked[name]} here" for name in asked if there[name] != asked[name]]
    if differing:
        raise UserError(
            f"{path} is of another run ({'; '.join(differing).replace('_', ' ')}), whose learning rate falls to zero "
            "at its end: --restart trains anew, --out DIR keeps both"
        )


def get_denoiser(options, network_class, check=lambda run: None):
    """The denoiser that the options ask for, from its checkpoint or trained now, and its `Run`.

    check(run) is called before the work begins, and may raise UserError too.
    Raises UserError or DataError where something is missing or doesn't fit; SystemExit where training was interrupted.
    """
    path, name = find_checkpoint(options), network_class.__name__
    checkpoint = None if options.restart else load_checkpoint(path)
    if options.sample_only:
        if checkpoint is None:
            raise UserError(f"{path}: no checkpoint there to draw from; run without --sample-only first")
        run = checkpoint["run"]
        typed = {field: getattr(options, field) for field in ("preset", "epochs", "batch_size")}
        asked = {"network": name, **{field: value for field, value in typed.items() if value}}
    else:
        preset_name = options.preset or ("lecture" if options.device.type == "cuda" else "small")
        preset = PRESETS[preset_name]
        epochs, batch_size = options.epochs or preset.epochs, options.batch_size or preset.batch_size
        take_part(options.device, batch_size)
        if LOCAL_RANK:
            join()  # here already, to find what the first process of the machine downloads
        data = load(options.data, "train", options.data_dir)
        images = pad(torch.from_numpy(data.images)[:, None], preset)
        of_data = data.name, len(images), data.classes, data.images.shape[1:], images.float().std().item() / 127.5
        run = Run(name, preset_name, epochs, batch_size, options.seed, *of_data)
        asked = run._asdict()
    if checkpoint:
        check_same(path, checkpoint["run"], asked)
    check(run)
    if not options.sample_only:
        join()
        run, checkpoint = from_first(run, checkpoint)

    denoiser = make_denoiser(run, network_class, options.device)
    average = make_denoiser(run, network_class, options.device, checkpoint and checkpoint["average"])
    average.eval().requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    cuda = options.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{options.device}, {torch.get_num_threads()} threads"
    device = f"{PROCESSES} × {device}" if PROCESSES > 1 else device
    print(f"data      {run.data}: {run.images:,} images, {run.size[0]} × {run.size[1]}, {len(run.classes)} classes")
    print(f"network   {run.network}, preset {run.preset}: {parameters:,} parameters")
    print(f"device    {device}, {'bfloat16' if denoiser.precision else 'float32'}")
    if not options.sample_only:
        labels = torch.from_numpy(data.labels)
        fit(run, denoiser, average, images.to(options.device), labels.to(options.device), checkpoint, path)
        leave()
    return average, run


def fit(run, denoiser, average, images, labels, checkpoint, path):
    """Train, or go on training, under a progress bar; save a checkpoint now and then, at the end, and when stopped."""
    preset = PRESETS[run.preset]
    peak = preset.peak * (run.batch_size / preset.batch_size) ** 0.5  # gradients are noisy by 1 / sqrt(batch_size)
    optimizers = make_optimizers(denoiser, peak)
    done, losses = 0, torch.full((run.steps,), math.nan, device=images.device)
    if checkpoint:
        done = checkpoint["step"]
        if done == run.steps:
            print(f"training  finished in an earlier run ({path}); --restart trains anew")
            return
        losses.copy_(checkpoint["losses"])
        denoiser.load_state_dict(checkpoint["denoiser"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    print(f"training  {run.steps:,} steps of {run.batch_size} images" + (f", from step {done:,}" if done else ""))

    def save():
        if RANK:
            return
        content = {"run": run._asdict(), "step": done, "losses": losses, "average": average.state_dict()}
        if done < run.steps:
            content |= {"denoiser": denoiser.state_dict(), "optimizers": [part.state_dict() for part in optimizers]}
        save_checkpoint(path, content)

    n = run.batch_size // PROCESSES
    share = slice(RANK * n, (RANK + 1) * n)
    if images.device.type == "cuda":
        training_label = denoiser.network.training_label
        compile_network(denoiser, draw_batch(images, labels, run.batch_size, run.seed, 0, training_label, share))
    total, begun = run.steps * run.batch_size, done * run.batch_size
    bar = tqdm(total=total, initial=begun, unit=" images", unit_scale=True, dynamic_ncols=True, disable=RANK > 0)
    replica = Replica(denoiser) if PROCESSES > 1 else denoiser
    to_do = done, run.steps, run.batch_size, run.seed, share
    training = train(replica, average, optimizers, images, labels, *to_do)
    at_hand = PROCESSES == 1 or images.device.type == "cpu"  # whether to stop is known without waiting for a GPU
    saved = time.monotonic()
    with bar, stop_requests() as requests:
        for step, loss in training:
            losses[step], stop = agree(loss, requests)
            done = step + 1
            if done % 20 == 0:  # seldom, because it waits for a GPU
                bar.set_postfix(loss=f"{losses[done - 20 : done].mean().item():.3f}", refresh=False)
            bar.update(run.batch_size)
            if time.monotonic() > saved + 120:
                save()
                saved = time.monotonic()
            if (at_hand or done % 20 == 0) and stop:
                break
        bar.close()
        save()
        if done < run.steps:
            again = shlex.join(argument for argument in sys.argv if argument != "--restart")
            again = f"{'python' if PROCESSES == 1 else 'torchrun ...'} {again}"
            print(f"stopped after step {done:,} of {run.steps:,}; all is saved in {path}. To go on:", again, sep="\n")
            sys.stdout.flush()
            if PROCESSES > 1:
                dist.barrier()  # as soon as one has left, torchrun ends the others
            raise SystemExit(130)
    print(f"wrote {path}")
    save_losses(path.with_name("loss.png"), f"{run.title}: the loss", losses.cpu().numpy())


def compile_network(denoiser, batch):
    """Make few large kernels of the network's many small ones; where that fails, say so and leave it as it is.

    batch: (x0, sigma, noise, label) as in training; a pass with it shows now whether it works.
    """
    print("compile   the network with torch.compile, which can take a minute", flush=True)
    denoiser.network.compile()  # in place: the names of the weights stay
    try:
        denoising_loss(denoiser, *batch).mean().backward()
    except Exception as error:  # of many kinds: no compiler for the CPU's part, a GPU too old, ...
        denoiser.network.compile(disable=True)
        reason = " ".join(str(error).split("\n")[:2])  # "backend='inductor' raised:", and what
        print(f"compile   failed, so training will be slower ({reason})")
    denoiser.zero_grad()


def draw(make_denoise, starts, run, options, title, rows=(), columns=10, batch_size=200):
    """Sample, and write samples.png and samples.npy; after training also denoising.png, a film strip of four images.

    make_denoise(chosen): what `sample` needs for the images in that slice. starts: (seed, label, index) of each image.
    """
    noise = draw_noise(run, options.device, starts)
    filmed = np.linspace(0, min(len(noise), batch_size) - 1, min(len(noise), 4)).round().astype(int)
    images, film = [], []
    with tqdm(total=len(noise) * options.steps, unit=" evaluations", unit_scale=True, leave=False) as bar:
        for first in range(0, len(noise), batch_size):
            chosen = slice(first, first + batch_size)
            states = sample(make_denoise(chosen), noise[chosen], noise_levels(options.steps))
            for sigma, *state in states:
                x, x0_hat = (crop(part, run.size).cpu() for part in state)
                bar.update(len(x) if sigma else 0)
                if first == 0:
                    film.append((sigma, x[filmed], x0_hat[filmed]))
            images.append(x)
    images = torch.cat(images).clamp(-1, 1)
    save_images(options.out / "samples.png", title, images, columns, rows)
    np.save(options.out / "samples.npy", images.numpy())
    print(f"wrote {options.out / 'samples.npy'}")
    if not options.sample_only:
        save_film(options.out / "denoising.png", f"{title}: from noise to garment", film)


def save_losses(path, title, losses):
    """The loss of each step, and its mean over the last 2 % of the steps."""
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(losses, color="0.8", linewidth=0.7, label="each step")
    axes.plot(range(window - 1, len(losses)), smooth, color="black", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="weighted squared error", title=title, ylim=(0, min(1.1, 1.1 * losses.max())))
    axes.legend()
    save_picture(figure, path)


# %% Lesson 3 as a command
def main(options):
    denoiser, run = get_denoiser(options, UNet if options.no_time else TimeUNet)
    starts = [(options.seed, 0, index) for index in range(options.n)]
    draw(lambda chosen: denoiser, starts, run, options, f"{run.title}, {options.steps} steps")


if __name__ == "__main__":
    parser = make_parser("03_unet_uncond.py", __doc__)
    parser.add_argument("--no-time", action="store_true", help="the first U-Net, which isn't told the time")
    parser.set_defaults(n=100)
    start(parser, main, lesson)
