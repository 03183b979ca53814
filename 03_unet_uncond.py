"""Lesson 3: a U-Net learns to remove noise, which is all it takes to make images of garments.

First we build the network, step by step, without the time embedding. Then come noise, time and sampling, and finally
the training loop (lecture sections "U-Net" and "unconditional model"; notebook 26).

    python 03_unet_uncond.py [--no-time] [--epochs E] [--help]   trains the unconditional model and samples from it
    python 03_unet_uncond.py --show                              runs the sections, in two minutes
"""

import copy
import functools
import importlib
import math
from itertools import pairwise
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import lesson_tools as tools

lesson1 = importlib.import_module("01_time_embedding")  # not `import 01_…`: a name can't start with a digit


# %% 1. A convolution comes after its norm and its activation
# A signal must survive every layer, or the last ones never see the image. A shortcut, x + ..., lets it through; but an
# activation *after* the sum, as in the original residual blocks, distorts and shrinks it in every block. Put the norm
# and the activation before each convolution instead, and a block's output is a plain sum.
#
# Here are the same layers in both orders; x keeps its shape `(n, c, h, w)`. Every residual branch is scaled to standard
# deviation 1, so only the order differs. (Unscaled, the difference is even larger.)
def unit(h):
    return h / h.std()


def activate_last(x, convs, norms):
    """Activations after the convolution and the sum (He et al. 2015, "Deep Residual Learning")."""
    h = F.silu(norms[0](convs[0](x)))
    return F.silu(x + unit(norms[1](convs[1](h))))


def activate_first(x, convs, norms):
    """Activations before the convolutions (He et al. 2016, "Identity Mappings in Deep Residual Networks")."""
    h = convs[0](F.silu(norms[0](x)))
    return x + unit(convs[1](F.silu(norms[1](h))))


@torch.no_grad()
def signal_through(block, x):
    """A list: x `(n, 16, h, w)`, then the output of each of 20 new blocks."""
    torch.manual_seed(0)
    states = [x]
    for _ in range(20):
        convs = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)]
        norms = [nn.GroupNorm(4, 16) for _ in range(2)]
        states.append(block(states[-1], convs, norms))
    return states


def correlation(a, b):
    """The correlation of two tensors `(n, c, h, w)`, each channel centred: 1 if they are equal, 0 if unrelated."""
    a, b = (tensor - tensor.mean(dim=(0, 2, 3), keepdim=True) for tensor in (a, b))
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@tools.section
def show_order():
    images, name = tools.load_images("test", 32)
    torch.manual_seed(0)
    x = nn.Conv2d(1, 16, 3, padding=1)(images).detach()  # n c h w
    shown, pictures, left = (0, 1, 2, 5, 10, 20), [], {}
    for order in (activate_first, activate_last):
        states, label = signal_through(order, unit(x)), order.__name__.replace("_", " ")
        left[label] = [correlation(states[i], x) for i in shown]
        print(f"   {label}: correlation with x after {shown}:", *(f"{value:.2f}" for value in left[label]))
        pictures += [states[i][0, :1] / (2 * states[i][0, 0].abs().mean()) for i in shown]  # one channel, 1 h w
    first, last = (values[-1] for values in left.values())
    subtitle = f"correlation after 20 untrained blocks: {first:.2f}, or {last:.2f} with activations last; {name}"
    title = f"More of an image survives if activations come first\n{subtitle}"
    return tools.plot_grid(title, torch.stack(pictures).clamp(-1, 1), 6, left, [f"after {i}" for i in shown])


# %% 2. The residual block
# So norm, activation and convolution form one layer, in this order. The norm is a group norm (Wu and He 2018): it takes
# the mean and variance of all pixels in a group of one image's channels. Batch norm, which the lecture uses, averages
# over the whole batch. Our batches will mix noise levels, so one image's activations would depend on others' noise.
# (Even so, batch norm gave better samples after one epoch: docs/measurements.md. We still prefer a norm that keeps
# images independent, and works the same way in training and in sampling.)
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


# A block adds the output of two convolutions to its input. The second starts at zero, so a new block returns its input
# unchanged (or, if the number of channels changes, a 1×1 convolution of it): the network starts out shallow, and each
# block joins in once it has learned something.
class ResBlock(nn.Module):
    """Two pre-activation convolutions and a shortcut, which is a 1×1 convolution if the numbers of channels differ."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.conv1 = PreActConv(in_channels, out_channels, groups)
        self.conv2 = PreActConv(out_channels, out_channels, groups)
        zero_(self.conv2.conv)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, embedding=None):
        """`(n, in_channels, h, w)` -> `(n, out_channels, h, w)`. The embedding, new in section 8, is ignored here."""
        return self.shortcut(x) + self.conv2(self.conv1(x))


@tools.section
def show_block():
    torch.manual_seed(0)
    x, wider = torch.randn(8, 16, 14, 14), ResBlock(16, 32, groups=4)
    h = wider.conv1(x)
    steps = {"x": x, "conv1": h, "conv2": wider.conv2(h), "shortcut(x)": wider.shortcut(x), "sum": wider(x)}
    print("   " + ", ".join(f"{name} {tuple(step.shape)}" for name, step in steps.items()))
    print(f"   a new block, 16 channels in and out, changes its input by {(ResBlock(16, 16, 4)(x) - x).abs().max():g}")
    noisier = torch.cat([x[:1], x[1:] + 3 * torch.randn_like(x[1:])])  # the first image stays the same
    for name, norm in {"batch": nn.BatchNorm2d(16), "group": nn.GroupNorm(4, 16)}.items():
        change = (norm(noisier) - norm(x))[0].norm() / norm(x)[0].norm()
        print(f"   {name} norm: noise of std 3 on the other images changes the first one's activations by {change:.0%}")


# %% 3. Saved: the up path will need what the down path computed
# A U-Net shrinks the image on its down path and enlarges it again on its up path, which also needs what the down path
# computed. So the mix-in below saves the output of another class's `forward`. In `class SavedConv(Saved, nn.Conv2d)`,
# the `super()` inside Saved means Conv2d, as Python searches the bases from left to right (the method resolution
# order). Swap the two, and Python finds Conv2d's `forward` first, so ours never runs. (A list of outputs would do for
# our U-Net. The lecture's down path is an `nn.Sequential`, which keeps no list.)
class Saved:
    """Keeps a module's output until the up path takes it."""

    saved = None

    def forward(self, *inputs):
        self.saved = super().forward(*inputs)
        return self.saved

    def take(self):
        """Return the saved output and forget it, so that its memory can be freed."""
        saved, self.saved = self.saved, None
        return saved


# The lecture also shows a way without inheritance: a function wraps the module's `forward`. It's shorter, and works on
# any existing module. But a deep copy of the module still calls the original's forward, with the original's weights,
# and we do copy our network, to average its weights (section 14). So we stick with the mix-in.
def saved(module):
    """Make a module keep its output in `module.saved` from now on. Returns the module."""
    forward = module.forward

    @functools.wraps(forward)
    def keep(*inputs):
        module.saved = forward(*inputs)
        return module.saved

    module.forward = keep
    return module


class SavedResBlock(Saved, ResBlock):
    pass


class SavedConv(Saved, nn.Conv2d):
    pass


@tools.section
def show_saved():
    class WrongOrder(nn.Conv2d, Saved):
        """What not to do."""

    for kind in (SavedConv, WrongOrder):
        conv, x = kind(1, 4, 3), torch.randn(2, 1, 8, 8)
        order = " -> ".join(parent.__name__ for parent in kind.__mro__[:-1])
        y = conv(x)
        kept = conv.saved
        print(f"   {order}: runs {kind.forward.__qualname__}, saves {'nothing' if kept is None else tuple(kept.shape)}")
        print(f"      still computes the convolution: {torch.equal(y, F.conv2d(x, conv.weight, conv.bias))}")
    wrapped = saved(nn.Conv2d(1, 4, 3))
    twin = zero_(copy.deepcopy(wrapped))
    y = wrapped(x)
    print(f"   saved(conv): saves {tuple(wrapped.saved.shape)}")
    print(f"      a copy with zeroed weights still gives the original's output: {torch.equal(twin(x), y)}")


# %% 4. The U-Net (Ronneberger et al. 2015)
# Down: each level is a few residual blocks. A convolution of stride 2 then halves height and width, so the receptive
# field grows much faster. The next level has a quarter of the pixels but twice the channels, in and out, so each pixel
# is four times the work: all levels cost about the same. (The strided convolution comes from DDPM's code. The lecture
# warns against assuming that it is optimal: there are hardly any ablations.) `--no-time --preset lecture` trains this
# network, with the lecture's 32 to 256 channels.
#
# Up: the same in reverse. Each block gets the current activation, concatenated with one saved at the same size on the
# way down: a skip connection. Going up, each level has one more block, for the convolution saved before that level.
class UNet(nn.Module):
    """Down path, middle, up path; every activation saved on the way down is concatenated back on the way up.

    channels: of the image, in and out.
    widths:   the channels of each level; each level has half the height and width of the one before.
    depth:    residual blocks per level on the way down; on the way up there is one more.
    groups:   of every group norm; must divide every width.
    """

    def __init__(self, channels, widths, depth, groups):
        super().__init__()
        self.widths, self.groups = tuple(widths), groups
        self.conv_in = SavedConv(channels, widths[0], 3, padding=1)
        width, skips = widths[0], [widths[0]]  # current channels, and those of each saved activation

        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, new_width in enumerate(widths):
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
        for i, new_width in enumerate(reversed(widths)):  # from the bottom of the U up
            if i > 0:
                smooth = nn.Conv2d(width, width, 3, padding=1)  # smooths the 2×2 squares of equal pixels
                self.upsample.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), smooth))
            blocks = nn.ModuleList()
            for _ in range(depth + 1):
                blocks.append(self.make_block(width + skips.pop(), new_width))
                width = new_width
            self.up.append(blocks)

        self.conv_out = PreActConv(width, channels, groups)
        zero_(self.conv_out.conv)

    def make_block(self, in_channels, out_channels, saved=False):
        """A residual block; later U-Nets override this to make others."""
        return (SavedResBlock if saved else ResBlock)(in_channels, out_channels, self.groups)

    def forward(self, x, embedding=None):
        """x and the result: `(n, channels, height, width)`. embedding: passed to every block, for section 8.

        Raises ValueError if height or width isn't a multiple of 2 ** (levels - 1).
        """
        multiple = 2 ** len(self.downsample)
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, got {x.shape[2]} × {x.shape[3]}")
        h, savers = self.conv_in(x), [self.conv_in]  # n widths[0] height width
        for level, blocks in enumerate(self.down):
            if level > 0:
                h = self.downsample[level - 1](h)  # n c h w -> n c h/2 w/2
                savers.append(self.downsample[level - 1])
            for block in blocks:
                h = block(h, embedding)  # n c h w -> n new_width h w
                savers.append(block)
        for block in self.middle:
            h = block(h, embedding)
        for i, blocks in enumerate(self.up):
            if i > 0:
                h = self.upsample[i - 1](h)  # n c h w -> n c 2h 2w
            for block in blocks:
                h = torch.cat([h, savers.pop().take()], dim=1)  # n c+skip h w: the skip from the way down
                h = block(h, embedding)  # n c+skip h w -> n new_width h w
        return self.conv_out(h)  # n channels height width


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@tools.section
def show_levels():
    network, x = UNet(1, (32, 64, 128, 256), depth=2, groups=2), torch.zeros(1, 1, 32, 32)  # the lecture's widths
    print(f"   {tuple(x.shape)} -> {tuple(network(x).shape)}, and {count_parameters(network):,} parameters")
    for level, width in enumerate(network.widths):
        parameters = count_parameters(network.down[level]) + count_parameters(network.up[-1 - level])
        side = 32 // 2**level
        work = parameters * side**2 / 1e6  # a convolution multiplies each of its weights once per pixel
        print(f"   {width:3} channels of {side:2} × {side:2}: {parameters:9,} parameters, {work:.0f} M multiplications")


# %% 5. What the skips are for
# At the bottom of the small U-Net below, a garment is 7 × 7 pixels of 32 channels. That is room enough to say where its
# edges run, but the network would have to learn to pack them into channels and unpack them again. The skips hand them
# straight across. What is that worth? We train a second network with its skips cut: every saved activation arrives as
# zeros. Both start from the same weights, see the same batches, and learn to remove the same amount of noise.
def cut_skips(network):
    for layer in network.modules():
        if isinstance(layer, Saved):
            layer.take = lambda take=layer.take: torch.zeros_like(take())  # `take=` binds this layer's own method


def train_skips(cut, images, steps=100):
    """A small U-Net trained to remove noise of std 0.5 from images `(n, 1, h, w)`, and its loss at each step."""
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


@tools.section
def show_skips():
    (images, name), (unseen, _) = tools.load_images("train", 512), tools.load_images("test", 8)
    torch.manual_seed(1)
    noisy = unseen + 0.5 * torch.randn_like(unseen)
    rows, curves, errors = {"garment": unseen, "with noise": noisy}, {}, []
    for row, cut in {"with skips": False, "skips cut": True}.items():
        network, curves[row] = train_skips(cut, images)
        rows[row] = network(noisy)
        errors.append(float(F.mse_loss(rows[row], unseen)))
        print(f"   {row}: error {np.mean(curves[row][-20:]):.3f} in training, {errors[-1]:.3f} on test images")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), width_ratios=(2, 3))
    tools.plot_lines(left, range(100), curves, xlabel="training step", ylabel="mean squared error", ylim=(0, 0.4))
    tools.plot_images(right, torch.cat(list(rows.values())), len(unseen), rows)
    subtitle = f"{errors[1] / errors[0]:.1f} times the error ({len(unseen)} images); {name}"
    tools.set_title(figure, f"Edges blur without skips\n{subtitle}")
    return figure


# %% 6. Noise: x = x0 + sigma · noise
# From now on, noise comes in all strengths. sigma is its standard deviation, on pixels from -1 to 1. At 0.02 you can
# hardly see the noise; at 80 you can see nothing else (Karras et al. 2022, "Elucidating the Design Space of
# Diffusion-Based Generative Models", EDM; the lecture's notebook 26). At low noise x is almost the answer; at high
# noise it reveals almost nothing. In between, if noise hides an edge, the best single answer is the mean of all
# possible edges: a blur. Turning that blur into one garment takes many small steps (section 10). (Notebook 28 returns
# to a cosine schedule and predicts the noise; we stay with notebook 26.)
SIGMA_MIN, SIGMA_MAX = 0.01, 80.0  # sampling goes from the largest to the smallest (EDM: from 80 to 0.002)


def add_noise(x0, sigma, noise):
    """`(n, c, h, w)` and noise levels `(n,)` -> `(n, c, h, w)`; the noise has variance one."""
    return x0 + sigma.view(-1, 1, 1, 1) * noise


@tools.section
def show_noise():
    garment, name = tools.load_images("test", 1)
    torch.manual_seed(0)
    sigmas = torch.logspace(math.log10(0.02), math.log10(80), 10)
    x, titles = add_noise(garment, sigmas, torch.randn(10, 1, 28, 28)), []
    for sigma, picture in zip(sigmas, x, strict=True):
        value = correlation(picture[None], garment)
        print(f"   sigma {sigma:6.2f}: pixels {picture.min():7.1f} to {picture.max():6.1f}, correlation {value:5.2f}")
        titles.append(f"σ = {sigma:.2g}\n{value:.2f}")
    x = x / x.abs().amax(dim=(1, 2, 3), keepdim=True)
    title = f"More noise, less correlation with the garment\ncorrelation: the number below each σ; {name}"
    return tools.plot_grid(title, x, 10, titles=titles)


# %% 7. Preconditioning: c_in, c_skip, c_out and c_noise
# Two things would make learning hard. The standard deviation of x is 0.7 at low noise and 80 at high noise, but a
# network works best with inputs of the same scale. And neither obvious target works at both ends. Predicting x0 fails
# at low noise: x is nearly the answer, and reproducing it only adds errors. Predicting the noise fails at high noise:
# x0 is x - sigma · noise, and sigma multiplies every error. So we wrap the network in a *denoiser*, whose answer is
#
#     x0_hat = c_skip · x + c_out · network(c_in · x, c_noise)
#
# c_in scales x to variance one, whatever sigma is. c_skip passes on x itself, as far as we trust it: c_skip is the
# image's share of the variance sigma_data² + sigma². c_out scales what the network adds, so that the network's target
# has variance one too: minus the noise at low noise, the garment / sigma_data at high noise, a mix in between.
# (This c_skip also makes c_out, which multiplies the network's errors, as small as possible.) c_noise is the network's
# time input: ln(sigma) / 4, times a constant that makes the hands of 01's clock move.
#
# To save time, the network can work on patches: pixel_unshuffle turns 2×2 pixels into one pixel with 4 channels.
TIME_SCALE = 1000  # so times run from -1151 to 1096 (max_period 1000 does as well as 10000: docs/open_questions.md)


class Denoiser(nn.Module):
    """A network with EDM's preconditioning (Karras et al. 2022, table 1).

    network:    network(x, time, label); x is `(n, channels · patch², h/patch, w/patch)`, time and label are `(n,)`.
    sigma_data: standard deviation of the training images.
    patch:      side of the patches that become channels before the network, and pixels again after it.
    precision:  the type in which the network computes (autocast), if given; everything around it keeps the type of x.
    """

    def __init__(self, network, sigma_data, patch=1, precision=None):
        super().__init__()
        self.network, self.sigma_data, self.patch, self.precision = network, sigma_data, patch, precision

    @property
    def device(self):
        return next(self.network.parameters()).device

    def scales(self, sigma):
        """c_skip, c_out and c_in for each sigma."""
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()

    def c_noise(self, sigma):
        """The time that the network gets for each sigma."""
        return TIME_SCALE * sigma.log() / 4

    def forward(self, x, sigma, label=None):
        """x: noisy images `(n, c, h, w)`. sigma: positive, `(n,)`, or one number for all. label: int64 `(n,)`, or None
        if the network needs none. Returns x0_hat `(n, c, h, w)`."""
        if not torch.is_tensor(sigma):
            sigma = x.new_full((len(x),), sigma)
        c_skip, c_out, c_in = self.scales(sigma.view(-1, 1, 1, 1))  # n 1 1 1, each
        with torch.autocast(x.device.type, self.precision, enabled=self.precision is not None):
            h = F.pixel_unshuffle(c_in * x, self.patch)  # n (c patch patch) h/patch w/patch
            h = self.network(h, self.c_noise(sigma), label)
        return c_skip * x + c_out * F.pixel_shuffle(h.to(x.dtype), self.patch)


@tools.section
def show_preconditioning():
    images, _ = tools.load_images("test", 500)
    torch.manual_seed(0)
    noise, denoiser = torch.randn_like(images), Denoiser(None, sigma_data=float(images.std()))
    print(f"   sigma_data {denoiser.sigma_data:.3f}")
    print("     sigma   c_skip    c_out     c_in  c_noise          std of x   of c_in x   of the target")
    for sigma in torch.tensor([0.02, 0.1, 0.5, 2, 10, 80]):
        c_skip, c_out, c_in = denoiser.scales(sigma)
        x = images + sigma * noise
        deviations = x.std(), (c_in * x).std(), ((images - c_skip * x) / c_out).std()
        row = sigma, c_skip, c_out, c_in, denoiser.c_noise(sigma), *deviations
        print("   {:7.2f}{:9.4f}{:9.4f}{:9.4f}{:9.0f}{:18.2f}{:12.2f}{:16.2f}".format(*row))
    sigmas = torch.logspace(-2, 2, 200)
    names = ("c_skip: how much of x is kept", "c_out: how much the network adds", "c_in: how x is scaled")
    curves = dict(zip(names, denoiser.scales(sigmas), strict=True))
    title = "The noisier x is, the less of it is kept"
    return tools.plot_curves(title, sigmas, curves, xscale="log", xlabel="sigma", ylabel="factor")


# %% 8. Time
# c_in gives every x about the same scale, so the scale no longer reveals the noise level. (A flat background does,
# if the noise isn't high; section 14 measures what time is worth.) So all blocks get the embedding of 01; each turns it
# into a scale and a shift per channel. These act *after* the second norm. The lecture applies them before it, but there
# a group norm would remove what a group's channels share. (Our order didn't improve the samples: docs/measurements.md.)
class TimePreActConv(PreActConv):
    """A pre-activation convolution with scale and shift between norm and activation (adaptive group norm, or FiLM)."""

    def __init__(self, in_channels, out_channels, groups, embedding_dim):
        super().__init__(in_channels, out_channels, groups)
        self.scale_shift = lesson1.ScaleShift(embedding_dim, in_channels)

    def forward(self, x, embedding):
        return self.conv(F.silu(self.scale_shift(self.norm(x), embedding)))


class TimeResBlock(ResBlock):
    """A residual block that takes activations and the embedding `(n, embedding_dim)`."""

    def __init__(self, in_channels, out_channels, groups, embedding_dim):
        super().__init__(in_channels, out_channels, groups)
        self.conv2 = TimePreActConv(out_channels, out_channels, groups, embedding_dim)  # replaces ResBlock's
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

    def embed(self, time, label):
        """The embedding that every block gets, `(n, 4 * widths[0])`; 04 adds the label."""
        return self.embed_time(time)

    def forward(self, x, time, label=None):
        """x and the result: `(n, channels, height, width)`; time: `(n,)`, float."""
        return super().forward(x, self.embed(time, label))


class UntimedUNet(UNet):
    """The U-Net of section 4, with the signature of the others: it ignores time and label."""

    def forward(self, x, time, label=None):
        return super().forward(x)


@tools.section
def show_time():
    torch.manual_seed(0)
    x, norm = torch.randn(4, 16, 14, 14), nn.GroupNorm(4, 16)
    before, after = (norm(3 * x + 1) - norm(x)).abs().mean(), (3 * norm(x) + 1 - norm(x)).abs().mean()
    print(f"   scale 3, shift 1 change the output by {before:.0e} if applied before the norm, {after:.1f} if after")


# %% 9. The loss
# Take a batch of images, add noise to each at a level of its own, and let the denoiser predict the clean images.
def denoising_loss(denoiser, x0, sigma, noise, label=None):
    """The squared error of x0_hat, weighted by 1 / c_out² (Karras et al. 2022, equation 8). Returns `(n,)`.

    So it is the plain squared error of the network's own output, whose target is (x0 - c_skip · x) / c_out, as in the
    lecture's `noisify`.
    """
    x0_hat = denoiser(add_noise(x0, sigma, noise), sigma, label)
    _, c_out, _ = denoiser.scales(sigma)
    return (x0_hat - x0).square().mean(dim=(1, 2, 3)) / c_out**2


# A new network outputs zero, so its loss is the mean square of its target: 1 at low noise, and 1 + (mean / sigma_data)²
# at high noise (the mean of all pixels). So at first no noise level outweighs the others by much; later, the loss is
# several times as high at both ends as in the middle (section 14).
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # 994 of 1,000 training levels (section 14) are in this range


@torch.no_grad()
def loss_by_level(denoiser, images, levels=LEVELS):
    """A list of the mean losses on images `(n, c, h, w)` at each noise level, always with the same noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return [float(denoising_loss(denoiser, images, torch.full((len(images),), s), noise).mean()) for s in levels]


@tools.section
def show_loss():
    images, _ = tools.load_images("test", 100)
    denoiser, levels = Denoiser(TimeUNet(4, (16, 32), 1, 4), float(images.std()), patch=2), (0.01, *LEVELS, 80)
    print("   sigma                    " + "".join(f"{sigma:7g}" for sigma in levels))
    print("   loss of a new network    " + "".join(f"{loss:7.3f}" for loss in loss_by_level(denoiser, images, levels)))
    print(f"   1 + (mean / sigma_data)² {1 + (images.mean() / images.std()) ** 2:.3f}")


# %% 10. Sampling: one step by hand, then all
# We start from pure noise and take small steps towards the denoiser's prediction. At first, that prediction is nearly
# the same for any noise: roughly the mean of all garments. Each step goes just far enough to bring the noise down to
# the next sigma. The less noise there is, the more of a garment the denoiser sees in x, until x has become one.
STEPS = 14  # with more, fewer trajectories go astray (section 11), but 18 gave no better samples (docs/measurements.md)


def noise_levels(steps=STEPS, rho=7):
    """`steps` values from SIGMA_MAX to SIGMA_MIN, denser at the small end, then 0 (Karras et al. 2022, equation 5)."""
    ramp = np.linspace(SIGMA_MAX ** (1 / rho), SIGMA_MIN ** (1 / rho), steps)
    return [*(ramp**rho).tolist(), 0.0]


def starting_noise(seed, label, index, shape):
    """The noise that image `index` of class `label` starts from, float32: a function of the four arguments alone."""
    return torch.from_numpy(np.random.default_rng((seed, label, index)).standard_normal(shape, np.float32))


# Each of the three samplers takes denoise(x, sigma), which predicts x0 from x `(n, c, h, w)` and a number sigma; noise
# `(n, c, h, w)` of variance 1; and the falling noise levels, which end with 0. It yields every state (sigma, x, x0_hat)
# on the way from noise to images; in the last one sigma is 0, and x = x0_hat.
@torch.no_grad()
def sample_ddim(denoise, noise, sigmas):
    """DDIM: each step treats x0_hat as constant (Song, Meng and Ermon 2021; notebook 28). Error ~ 1 / steps."""
    x = sigmas[0] * noise
    for sigma, sigma_next in pairwise(sigmas):
        x0_hat = denoise(x, sigma)
        yield sigma, x, x0_hat
        x = x0_hat + sigma_next / sigma * (x - x0_hat)  # keep this fraction of the noise
    yield 0.0, x, x


@torch.no_grad()
def sample_dpm(denoise, noise, sigmas):
    """DPM-Solver++(2M): each step assumes that x0_hat keeps changing as in the previous step, linearly in ln(sigma)
    (Lu et al. 2022, algorithm 2). Error ~ 1 / steps², still with one network evaluation (NFE) per step."""
    x, sigma_last, x0_hat_last = sigmas[0] * noise, None, None
    for sigma, sigma_next in pairwise(sigmas):
        x0_hat = target = denoise(x, sigma)
        yield sigma, x, x0_hat
        if x0_hat_last is not None and sigma_next > 0:  # the first step and the last are DDIM's
            ratio = math.log(sigma / sigma_next) / math.log(sigma_last / sigma)
            target = x0_hat + ratio / 2 * (x0_hat - x0_hat_last)  # halfway: x0_hat's mean over the step
        x = target + sigma_next / sigma * (x - target)
        sigma_last, x0_hat_last = sigma, x0_hat
    yield 0.0, x, x


@torch.no_grad()
def sample_heun(denoise, noise, sigmas):
    """Heun's method: each step follows the mean of the slopes dx / dsigma at its two ends (Karras et al. 2022,
    algorithm 1). Error ~ 1 / steps², with two network evaluations per step."""
    x = sigmas[0] * noise
    for sigma, sigma_next in pairwise(sigmas):
        x0_hat = denoise(x, sigma)
        yield sigma, x, x0_hat
        slope = (x - x0_hat) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    yield 0.0, x, x


# A network has to be trained before it can sample. But for a given set of images, the ideal denoiser can be written
# down: x may come from any of them, with a probability that falls with the distance, so the best guess is their mean,
# weighted by these probabilities. This is attention (02): x is the query, the images are keys and values, and the
# scores are negative squared distances, divided by 2 sigma². So at high noise it predicts the mean of all images, at
# low noise the nearest one. This denoiser can only reproduce its images. A trained network makes new ones: 04's samples
# are typically a bit farther from the training images than test images are (docs/measurements.md).
def ideal_denoiser(images):
    """denoise(x, sigma) for the samplers: the best possible if x0 is one of the images `(m, c, h, w)`."""

    def denoise(x, sigma):
        squared = torch.cdist(x.flatten(1), images.flatten(1)) ** 2  # n m
        weights = (-squared / (2 * sigma**2)).softmax(dim=1)  # n m: Bayes' rule
        return (weights @ images.flatten(1)).view_as(x)  # n (c h w) -> n c h w

    return denoise


def pixel_std(images):
    """How much images `(n, ...)` differ: a pixel's standard deviation across them (root mean square over pixels)."""
    return float(images.var(dim=0).mean().sqrt())


def plot_denoising(title, states):
    """A denoising strip: the states x of a sampler (scaled to be visible), each with the predicted x0 below it."""
    frames = [states[round(i)] for i in np.linspace(0, len(states) - 1, min(10, len(states)))]
    strips = []
    for image in range(len(frames[0][1])):
        strips += [x[image] / max(1.0, x[image].std().item()) for _, x, _ in frames]
        strips += [x0_hat[image] for _, _, x0_hat in frames]
    rows, titles = ["x", "x0_hat"] * len(frames[0][1]), [f"σ = {sigma:.2g}" for sigma, _, _ in frames]
    return tools.plot_grid(title, torch.stack(strips), len(frames), rows, titles)


@tools.section
def show_sampling():
    images, name = tools.load_images("train", 1000)
    denoise, sigmas = ideal_denoiser(images), noise_levels()
    noise = torch.stack([starting_noise(0, 0, index, (1, 28, 28)) for index in range(4)])
    x = sigmas[0] * noise  # n c h w: nothing but noise
    x0_hat = denoise(x, sigmas[0])  # n c h w
    x_next = x0_hat + sigmas[1] / sigmas[0] * (x - x0_hat)  # n c h w: less noise, in the same direction
    states = list(sample_dpm(denoise, noise, sigmas))
    print(f"   sigma {sigmas[0]:.1f} to {sigmas[1]:.1f}: std of x {x.std():.1f} to {x_next.std():.1f}")
    print(f"   by hand and by sample_dpm: largest difference {(x_next - states[1][1]).abs().max():g}")
    print("      sigma         std of x   of x0_hat    of x0_hat across the four images")
    for sigma, x, x0_hat in states[::3]:
        print(f"   {sigma:8.3f}{x.std():17.2f}{x0_hat.std():12.2f}{pixel_std(x0_hat):36.2f}")
    early, late = pixel_std(states[0][2]), pixel_std(states[-1][2])
    subtitle = f"ideal denoiser; a pixel's standard deviation across the four: {early:.2f}, then {late:.2f}; {name}"
    return plot_denoising(f"Predictions start alike and end as different garments\n{subtitle}", states)


# %% 11. Few steps or many
# The trajectory from noise to a garment is a curve, and a step of DDIM follows its tangent. So the more steps, the
# closer we stay to the curve. A method that also looks back at the step before, as DPM-Solver++(2M) does, follows the
# bend, and gets as close in fewer steps. As ground truth we take the end points of 400 Heun steps. With the ideal
# denoiser, each trajectory ends on one of its images, so we count how many of 100 end on a wrong one.
@tools.section
def show_few_steps():
    images, name = tools.load_images("train", 1000)
    noise = torch.stack([starting_noise(0, 0, index, (1, 28, 28)) for index in range(100)])
    counts, samplers, wrong = (3, 6, STEPS, 24, 48), {"DDIM": sample_ddim, "DPM-Solver++": sample_dpm}, {}
    *_, (_, ends, _) = sample_heun(ideal_denoiser(images), noise, noise_levels(400))  # x of the last state
    print("   wrong garments, after" + "".join(f"{steps:4}" for steps in counts) + " steps")
    for method, sample in samplers.items():
        wrong[method] = []
        for steps in counts:
            *_, (_, x, _) = sample(ideal_denoiser(images), noise, noise_levels(steps))
            wrong[method].append(int(((x - ends).abs().amax(dim=(1, 2, 3)) > 0.1).sum()))
        print(f"   {method:21}" + "".join(f"{value:4}" for value in wrong[method]) + "  of 100")
    ddim, dpm = (values[counts.index(STEPS)] for values in wrong.values())
    subtitle = f"ideal denoiser, {STEPS} steps: {dpm} of 100 end on a wrong garment; with DDIM, {ddim}; {name}"
    labels = {"xlabel": "steps", "ylabel": "wrong garments, out of 100", "ylim": 0}
    return tools.plot_curves(f"DPM-Solver++ needs fewer steps than DDIM\n{subtitle}", counts, wrong, **labels)


# %% 12. One trajectory, three coordinates: DDPM, EDM, flow matching
# DDPM's noisy image is √ᾱ x0 + √(1 - ᾱ) noise, with ᾱ falling from 1 to 0 over a thousand steps (Ho et al. 2020); EDM's
# is x0 + sigma noise (notebook 26). Flow matching isn't in the lecture, but many later models use it. It mixes image
# and noise in proportions that sum to one: z = (1 - t) x0 + t noise (Lipman et al. 2023, whose t runs the other way).
# Divide each by its coefficient of x0, and all three become x0 + sigma noise, with ᾱ = 1 / (1 + sigma²) and
# sigma = t / (1 - t). (Notebook 28 is DDPM with a continuous t, on pixels from -0.5 to 0.5: its sigma is half of ours.)
#
# The velocity of z is noise - x0, and one Euler step along it *is* DDIM's step: both keep the predicted image and the
# predicted noise, and mix them in new proportions.
@torch.no_grad()
def sample_flow(denoise, noise, times):
    """Yield (t, z) at each of the times, which fall from below 1 to 0; the first z is times[0] * noise."""
    z = times[0] * noise
    for t, t_next in pairwise(times):
        yield t, z
        z = z + (t_next - t) * (z - denoise(z / (1 - t), t / (1 - t))) / t  # (z - x0) / t is noise - x0
    yield 0.0, z


@tools.section
def show_coordinates():
    ddpm_sigmas = np.sqrt(1 / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)) - 1)  # a thousand; cumprod gives ᾱ
    print("     sigma        ᾱ        t   DDPM's step   notebook 28's time   time of our network")
    for sigma in (0.01, 0.047, 0.5, 1, 5, 80):
        step = np.abs(np.log(ddpm_sigmas / sigma)).argmin()  # the nearest
        print(f"   {sigma:7.3f}{1 / (1 + sigma**2):9.4f}{sigma / (1 + sigma):9.4f}{step:14d}", end="")
        print(f"{2 / math.pi * math.atan(sigma / 2):21.3f}{TIME_SCALE * math.log(sigma) / 4:22.0f}")
    torch.manual_seed(0)
    denoise, noise = ideal_denoiser(tools.load_images("train", 100)[0].double()), torch.randn(4, 1, 28, 28).double()
    flow = sample_flow(denoise, noise, [sigma / (1 + sigma) for sigma in noise_levels()])
    both = zip(flow, sample_ddim(denoise, noise, noise_levels()), strict=True)
    apart = max((z / (1 - t) - x).abs().max() for (t, z), (_, x, _) in both)
    print(f"   Euler's steps in t and DDIM's in sigma: largest difference {apart:.0e}")


# %% 13. Not in the lecture: Muon, an optimiser for convolutions
# A few directions often dominate a weight matrix's gradient, so the matrix hardly changes along the others. Muon
# (Jordan et al. 2024) takes the momentum, a running mean of gradients, and makes the step about equally large in all
# directions: nearly all singular values become about 1. A convolution's weights form a matrix too: a row for each
# output channel, a column for each input value under its kernel.
#
# Muon never computes the singular values. A polynomial of the matrix, X <- (a + b G + c G²) X with G = X Xᵀ, moves each
# singular value s to a s + b s³ + c s⁵, and five such steps bring all but the smallest to about 1. For a wide X, G is
# much smaller, so we do the steps on G and multiply by X only once, at the end. (For a tall X, Xᵀ X is the small one.)
def orthogonalize(matrices):
    """A list of the matrices `(rows, columns)` with all singular values moved to about 1 (0.68 to 1.20 if they were at
    least 0.0015 of the matrix's norm). matrices: float32, all with the same shorter side."""
    matrices = [x / (x.norm() + 1e-7) for x in matrices]
    gram = torch.stack([x @ x.mT if len(x) <= x.shape[1] else x.mT @ x for x in matrices])  # n side side
    identity = product = torch.eye(gram.shape[1], device=gram.device)
    for _ in range(5):
        polynomial = 3.4445 * identity - 4.775 * gram + 2.0315 * gram @ gram
        product, gram = polynomial @ product, polynomial @ polynomial @ gram  # X <- P X, so G <- P G P = P² G
    return [p @ x if len(x) == len(p) else x @ p for p, x in zip(product, matrices, strict=True)]


class Muon(torch.optim.Optimizer):
    """Optimises convolution weights `(o, i, h, w)`, each viewed as a matrix `(o, i h w)`. Matrices with the same
    shorter side are orthogonalised together."""

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
                lr = group["lr"] * max(1, len(step) / step.shape[1]) ** 0.5  # a tall matrix's rows come out shorter
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(lr * step.view(weight.shape))


def use_adamw(parameters, max_lr):
    """AdamW for all parameters, in a list; max_lr: the highest learning rate."""
    return [torch.optim.AdamW(parameters, max_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]


def use_muon(parameters, max_lr):
    """Muon for the convolutions, AdamW for everything else, in a list; max_lr: AdamW's highest learning rate."""
    parameters = list(parameters)
    convolutions = [parameter for parameter in parameters if parameter.ndim == 4]
    others = [parameter for parameter in parameters if parameter.ndim != 4]
    return [Muon(convolutions, 10 * max_lr), *use_adamw(others, max_lr)]  # Muon's steps have smaller entries


@tools.section
def show_muon():
    torch.manual_seed(0)
    x = torch.randn(48, 12) @ torch.diag(torch.logspace(0, -2, 12)) @ torch.randn(12, 432)  # a few large directions
    values = {}
    for label, matrix in {"before": x / x.norm(), "after": orthogonalize([x])[0]}.items():
        values[label] = torch.linalg.svdvals(matrix)[:12].tolist()
        print(f"   singular values {label:6}:", *(f"{value:.3f}" for value in values[label]))
    labels = {"xlabel": "direction", "ylabel": "singular value", "ylim": 0}
    title = "Muon makes a step about equally large in all directions\nsingular values of a made-up matrix"
    return tools.plot_curves(title, range(1, 13), values, **labels)


# %% 14. The training loop
# Everything above comes together here. Warming up the learning rate keeps the first steps from throwing the weights
# off; clipping keeps a batch with a large gradient from dominating the optimisers' averages. Later, the weights jump
# about; their average is steadier, so we sample with it. (At the end, with a learning rate near zero, the two are
# nearly the same, and averaging made no measurable difference here: docs/measurements.md.)
P_MEAN, P_STD = -1.0, 1.0  # of ln(sigma), which is normally distributed
WARM_UP = 0.05  # the share of the steps during which the learning rate rises
CLIP = 1.0  # the largest norm allowed for all gradients together
EMA_SHARE = 0.1  # the average looks back over about this share of the steps so far


def train(denoiser, ema, optimizers, batches, steps):
    """Train, and after each step yield (step, loss, gradient norm), the last two as tensors on the device.

    ema: a copy of the denoiser; its weights become the average. batches: yields what `draw_batches` does. steps: the
    length of the whole training, for the schedule.
    """
    for step, x0, sigma, noise, label in batches:
        loss = denoising_loss(denoiser, x0, sigma, noise, label).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * schedule(step, steps)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(denoiser.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
        update_ema(ema, denoiser, step)
        yield step, loss.detach(), norm


def schedule(step, steps):
    """The learning rate, as a fraction of the highest: it rises during the warm-up, then falls linearly to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    return max(0.0, min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1)))


@torch.no_grad()
def update_ema(ema, denoiser, step):
    """Move the exponential moving average, EMA, towards the weights; its window grows (Karras et al. 2024)."""
    for slow, fast in zip(ema.parameters(), denoiser.parameters(), strict=True):
        slow.lerp_(fast, min(1.0, 1 / (EMA_SHARE * (step + 1))))  # EMA_SHARE = 1 would give the plain mean


# Some noise levels are worth more training than others. At low noise c_out, which multiplies the network's output, is
# about sigma, so its errors are hardly visible; at high noise, the noise hides the image. So we train mostly in
# between: two thirds of the levels lie between 0.14 and 1. (EDM's P_MEAN and P_STD are -1.2 and 1.2; see
# docs/measurements.md.) Sampling starts at 80, which training hardly ever sees: one level in 2,000 is above 10. But
# there is little to learn up there, where the best answer is a blur: the mean garment at 80, a rough shape at 10.
#
# An epoch is one pass over all images in random order. A step's randomness depends only on seed and step (for a given
# kind of device), so interrupting a run or splitting it across processes doesn't change its batches or noise.
@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order in which an epoch goes through n images: `(n,)`."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def draw_batches(images, labels, batch_size, seed, steps):
    """Yield (step, x0, sigma, noise, label) for each of `steps`, a range.

    images: uint8 `(n, c, h, w)`, labels: int64 `(n,)`, both on the device. Image i of step s is image number
    p = s · batch_size + i of the whole run: entry p % n of epoch p // n. Raises ValueError for images of another type.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, from 0 to 255, got {images.dtype}")
    n, device = len(images), images.device
    for step in steps:
        epochs, entries = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
        chosen = [epoch_order(n, seed, epoch)[entries[epochs == epoch]] for epoch in np.unique(epochs)]
        chosen = torch.from_numpy(np.concatenate(chosen)).to(device, non_blocking=True)
        mixed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)  # similar pairs give unrelated seeds
        torch.manual_seed(int(mixed[0]))
        x0 = images[chosen].float() / 127.5 - 1
        sigma = (P_MEAN + P_STD * torch.randn(batch_size, device=device)).exp()
        yield step, x0, sigma, torch.randn_like(x0), labels[chosen]


# We train three small networks, a minute in all, on the same batches with the same noise. For each we tried three or
# four learning rates and kept the best, so the rate doesn't explain the difference. (AdamW at 0.003, 0.006, 0.012 and
# 0.024 reaches a mean test loss of 0.433, 0.410, 0.404 and 0.426.) In this run, after 600 steps, time has lowered the
# loss by a tenth, and Muon by another seventh. (In 04, after an epoch: 2 % and 8 %; see docs/measurements.md.)
def train_small(network_class, images, make_optimizers, max_lr, steps=600):
    """A small denoiser trained on images `(n, 1, h, w)` in [-1, 1], with averaged weights, and its training losses.
    make_optimizers: `use_adamw` or `use_muon`."""
    torch.manual_seed(0)
    denoiser = Denoiser(network_class(4, (16, 32), depth=1, groups=4), float(images.std()), patch=2)
    ema, optimizers = copy.deepcopy(denoiser), make_optimizers(denoiser.parameters(), max_lr)
    pixels, labels = ((images + 1) * 127.5).round().byte(), torch.zeros(len(images), dtype=torch.int64)
    batches = draw_batches(pixels, labels, 32, 0, range(steps))
    return ema, [float(loss) for _, loss, _ in train(denoiser, ema, optimizers, batches, steps)]


@tools.section
def show_training():
    (images, _), (unseen, name) = tools.load_images("train", 60_000), tools.load_images("test", 100)
    noise = torch.stack([starting_noise(0, 0, index, (1, 28, 28)) for index in range(8)])
    choices = {
        "AdamW, no time": (UntimedUNet, images, use_adamw, 0.012),
        "AdamW": (TimeUNet, images, use_adamw, 0.012),
        "Muon and AdamW": (TimeUNet, images, use_muon, 0.0028),
    }
    curves, rows, means = {}, {}, []
    print("   loss at sigma    " + "".join(f"{sigma:7g}" for sigma in LEVELS) + "   mean")
    for choice, arguments in choices.items():
        ema, losses = train_small(*arguments)
        curves[choice] = np.convolve(losses, np.full(50, 1 / 50), mode="valid")
        *_, (_, rows[choice], _) = sample_dpm(ema, noise, noise_levels())
        by_level = loss_by_level(ema, unseen)
        means.append(np.mean(by_level))
        print(f"   {choice:17}" + "".join(f"{loss:7.3f}" for loss in [*by_level, means[-1]]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(2, 5))
    axes_labels = {"xlabel": "step", "ylabel": "loss (mean over 50 steps)", "ylim": (0, 1)}
    tools.plot_lines(left, range(50, 50 + len(curves[choice])), curves, **axes_labels)
    tools.plot_images(right, torch.cat(list(rows.values())), len(noise), rows)
    time, muon = means[1] / means[0] - 1, means[2] / means[1] - 1
    subtitle = f"test loss after {len(losses)} steps: {time:+.0%} with time, another {muon:+.0%} with Muon; {name}"
    tools.set_title(figure, f"In this short run, time and Muon each lower the loss\n{subtitle}")
    return figure


# %% The run
PREVIEW_IMAGES = 200  # at least this many draws, of training images and of held-out ones, for loss.png


class Preset(NamedTuple):
    widths: tuple[int, ...]  # channels of each level
    depth: int  # residual blocks per level
    groups: int  # of the group norms; below 16 channels per group, bfloat16 on a CPU takes several times as long
    patch: int  # side of the patches that the denoiser turns into channels
    attention_levels: tuple[int, ...]  # in 04
    head_dim: int  # channels per head, in 04
    batch_size: int
    max_lr: float  # AdamW's highest learning rate for that batch size
    images_seen: int  # in training


PRESETS = {
    # widths, depth, groups, patch, attention_levels, head_dim, batch_size, max_lr, images_seen
    "small": Preset((48, 96), 1, 3, 2, (1,), 32, 32, 7e-4, 180_000),
    "lecture": Preset((32, 64, 128, 256), 2, 2, 1, (1, 2, 3), 8, 256, 2e-3, 1_500_000),
}


class RunSettings(NamedTuple):
    """A run's settings and its data. The script refuses to resume a checkpoint with different settings."""

    network: str  # the name of its class
    preset: str
    steps: int
    batch_size: int
    seed: int
    data: str  # the data set's name
    images: int  # how many it has
    classes: tuple[str, ...]
    size: tuple[int, int]  # height and width of the images
    sigma_data: float
    counts: tuple[int, ...] = ()  # training images of each class

    @property
    def images_seen(self):
        return self.steps * self.batch_size

    @property
    def title(self):
        return f"{self.data}, {self.network}, {self.preset}, {self.images_seen:,} images seen"


def pad(images, preset):
    """Pad `(n, c, h, w)` with zeros, the background of uint8 images, just enough for the network to halve them."""
    multiple = preset.patch * 2 ** (len(preset.widths) - 1)
    rows, columns = (-size % multiple for size in images.shape[2:])  # to the next multiple
    return F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def crop(images, size):
    """The inverse of `pad`: the central `size` (height, width) of images `(n, c, h, w)`."""
    top, left = ((padded - wanted) // 2 for padded, wanted in zip(images.shape[2:], size, strict=True))
    return images[:, :, top : top + size[0], left : left + size[1]]


def make_network(preset, n_classes, network_class=TimeUNet):
    """A new network with a preset's sizes; this lesson's networks ignore the classes."""
    return network_class(preset.patch**2, preset.widths, preset.depth, preset.groups)


def make_denoiser(network, settings, device):
    """A denoiser with that network, as fast as the device allows."""
    precision = tools.choose_precision(device)
    denoiser = Denoiser(network, settings.sigma_data, PRESETS[settings.preset].patch, precision)
    return denoiser.to(device, memory_format=torch.channels_last)  # usually the fastest for convolutions


def load_denoiser(path, make_network, device):
    """The averaged denoiser in a checkpoint, and its `RunSettings`, with `steps` set to those done so far. Raises
    UserError if it can't be loaded."""
    checkpoint = tools.load_checkpoint(path, RunSettings)
    if checkpoint is None:
        raise tools.UserError(f"{path}: no checkpoint to sample from; train first, without --sample-only")
    settings = checkpoint["settings"]
    if settings.preset not in PRESETS:
        raise tools.UserError(f"{path}: unknown preset {settings.preset!r}; this version knows {', '.join(PRESETS)}")
    network = make_network(PRESETS[settings.preset], len(settings.classes))
    tools.check_same(path, settings, network=type(network).__name__)
    ema = make_denoiser(network, settings, device)
    tools.restore(path, checkpoint, {"ema": ema})
    seen = settings._replace(steps=checkpoint["step"])
    print(f"network   {seen.title}, {seen.steps:,} of {settings.steps:,} steps")
    return ema.eval().requires_grad_(False), seen


def new_run(options, path, make_network):
    """A new network, its `RunSettings`, the checkpoint to start from (see `run_resumable`), and the training data:
    images, uint8 `(n, 1, h, w)`, and labels, `(n,)`."""
    preset_name = options.preset or "small"
    preset = PRESETS[preset_name]
    batch_size = options.batch_size or preset.batch_size
    if batch_size % tools.PROCESSES:
        raise tools.UserError(f"--batch-size {batch_size}: must be a multiple of {tools.PROCESSES}, the process count")
    train = tools.load_data(options.data, "train", options.data_dir)
    n, classes, counts = len(train.labels), train.classes, np.bincount(train.labels).tolist()
    shown = [f"{name} ({count:,})" for name, count in zip(classes, counts, strict=True)]
    print(f"data      {train.name}: {n:,} images of {', '.join(shown[:30])}{', …' * (len(shown) > 30)}")
    torch.manual_seed(options.seed)
    network = make_network(preset, len(classes))
    steps = max(1, round((options.epochs * n if options.epochs else preset.images_seen) / batch_size))
    if steps * batch_size < preset.images_seen / 10:
        enough = f"for {preset.images_seen:,}, use --epochs {math.ceil(preset.images_seen / n)}"
        print(f"note      training will see only {steps * batch_size:,} images, so expect noisy samples; {enough}")
    images = pad(torch.from_numpy(train.images)[:, None], preset)
    sigma_data = round(images.float().std().item() / 127.5, 4)  # on another machine the last digits might differ
    if not sigma_data:
        raise tools.UserError(f"{train.name}: all images are the same grey; there is nothing to learn")
    known = {"network": type(network).__name__, "preset": preset_name, "steps": steps, "batch_size": batch_size}
    known |= {"seed": options.seed, "data": train.name, "images": n, "classes": classes, "counts": tuple(counts)}
    settings = RunSettings(**known, size=train.images.shape[1:], sigma_data=sigma_data)
    checkpoint = None if options.restart else tools.load_checkpoint(path, RunSettings, **settings._asdict())
    return network, settings, checkpoint or {"settings": settings, "step": 0}, (images, torch.from_numpy(train.labels))


@torch.no_grad()
def preview(ema, denoise, settings, held):
    """What the averaged network has learned so far: samples drawn with `denoise`, one per class (at least 10, at most
    20), and the mean loss on the batches in `held`, by name. The noise is always the same. See `run_resumable`."""
    n = min(20, len(settings.classes))
    noise_ids = [(settings.seed, i % n, i // n) for i in range(max(10, n))]
    samples, _ = sample_images(denoise, noise_ids, settings, STEPS, ema.device)
    losses = {name: [denoising_loss(ema, *batch).mean() for _, *batch in batches] for name, batches in held.items()}
    return samples, {name: float(torch.stack(each).mean()) for name, each in losses.items()}


def fit(options, path, make_network, guided, change_batches):
    """Train as the options say, or resume from the checkpoint at `path`; see `train_or_load`."""
    device = options.device
    network, settings, checkpoint, (images, labels) = new_run(options, path, make_network)
    tools.join_processes(device, (settings, checkpoint["step"]))
    if checkpoint["step"] == settings.steps:
        print("training  finished in an earlier run; --restart starts over")
        return
    preset, denoiser = PRESETS[settings.preset], make_denoiser(network, settings, device)
    ema = copy.deepcopy(denoiser)
    images, labels = images.to(device), labels.to(device)
    max_lr = preset.max_lr * (settings.batch_size / preset.batch_size) ** 0.5  # gradient noise falls as 1 / sqrt(batch)
    muon, adamw = use_muon(denoiser.parameters(), max_lr)
    shared = tools.distribute(denoiser.network)  # the same weights; each process computes its share
    trained = Denoiser(shared, denoiser.sigma_data, denoiser.patch, denoiser.precision)

    def loop(first):
        batches = draw_batches(images, labels, settings.batch_size, settings.seed, range(first, settings.steps))
        batches = change_batches(batches, len(settings.classes)) if change_batches else batches
        return train(trained, ema, [muon, adamw], tools.take_share(batches), settings.steps)

    def draw(images, labels):  # for the previews, with different noise from training
        steps = range(math.ceil(PREVIEW_IMAGES / settings.batch_size))
        return list(draw_batches(images, labels, settings.batch_size, settings.seed + 1, steps))

    held, test = {"training images": draw(images, labels)}, tools.load_data(options.data, "test", options.data_dir)
    unseen = pad(torch.from_numpy(test.images)[:, None], preset).to(device)
    if test.name == settings.data and not torch.equal(unseen, images):
        held["held-out images"] = draw(unseen, torch.from_numpy(test.labels).to(device))
    shape = " × ".join(map(str, settings.size))
    print(f"network   {settings.network}, {settings.preset}, for {shape}: {count_parameters(denoiser):,} parameters")
    print(f"device    {tools.PROCESSES} × {device.type}, {'bfloat16' if denoiser.precision else 'float32'}")
    print(f"watch     {path.with_name('progress.png')} and loss.png")
    state = {"denoiser": denoiser, "ema": ema, "muon": muon, "adamw": adamw}
    denoise = guided(ema, settings) if guided else ema
    tools.run_resumable(loop, functools.partial(preview, ema, denoise, settings, held), state, path, checkpoint)


def train_or_load(options, path, make_network, guided=None, change_batches=None):
    """The averaged denoiser that the options ask for, and its settings: from the checkpoint at `path`, or trained now.

    make_network(preset, n_classes): a new network. guided(denoiser, settings): the denoiser to draw previews with.
    change_batches(batches, n_classes): modifies the batches of `draw_batches`. Raises UserError or DataError if
    something is missing or doesn't fit; SystemExit after Ctrl-C.
    """
    if not options.sample_only:
        fit(options, path, make_network, guided, change_batches)
        tools.leave_processes()
    return load_denoiser(path, make_network, options.device)


def draw_noise(settings, noise_ids, device):
    """Starting noise `(n, 1, h, w)`, of a run's padded image size; noise_ids: one (seed, label, index) per image."""
    shape = pad(torch.empty(1, 1, *settings.size), PRESETS[settings.preset]).shape[1:]
    return torch.stack([starting_noise(*noise_id, shape) for noise_id in noise_ids]).to(device)


def sample_images(denoise, noise_ids, settings, steps, device):
    """Images `(n, 1, h, w)` in [-1, 1], one per noise id (seed, label, index); and the sampler's states for up to four.
    denoise(x, sigma, label): the predicted images."""
    images, strip = [], []
    for first in range(0, len(noise_ids), 200):
        batch = noise_ids[first : first + 200]
        shown = np.linspace(0, len(batch) - 1, min(len(batch), 4)).round().astype(int)
        label = torch.tensor([label for _, label, _ in batch], device=device)
        noise = draw_noise(settings, batch, device)
        states = sample_dpm(functools.partial(denoise, label=label), noise, noise_levels(steps))
        for sigma, x, x0_hat in tqdm(states, "sampling", steps + 1, leave=False, disable=None):
            if first == 0:
                strip.append((sigma, *(crop(part[shown], settings.size).cpu() for part in (x, x0_hat))))
        images.append(crop(x, settings.size).clamp(-1, 1).cpu())
    return torch.cat(images), strip


def save_samples(out, title, samples, rows=(), columns=10):
    """Write samples.npy, samples.png and denoising.png to the folder out. samples: what `sample_images` returned."""
    images, strip = samples
    tools.write_atomically(out / "samples.npy", lambda file: np.save(file, images.numpy()))
    print(f"wrote {out / 'samples.npy'}")
    shown, rows = images[:400], rows[:400]
    if rows:  # the first of each class
        kept = max(1, min(columns, 400 // len(rows)))
        shown, columns = images.unflatten(0, (-1, columns))[: len(rows), :kept].flatten(0, 1), kept
    part = f"\n{len(shown):,} of {len(images):,}" * (len(shown) < len(images))
    tools.save_picture(out / "samples.png", tools.plot_grid, title + part, shown, columns, rows)
    tools.save_picture(out / "denoising.png", plot_denoising, f"From noise to image\n{title}", strip)


# %% The command
def main():
    parser, _ = tools.make_run_parser(__file__, __doc__, PRESETS)
    parser.add_argument("--no-time", action="store_true", help="train the U-Net without time (section 4)")
    parser.set_defaults(n=100, steps=STEPS)
    options = tools.parse_run_options(parser)
    if options.show:
        tools.run_sections(globals(), options.out / "lesson")
        return
    make = functools.partial(make_network, network_class=UntimedUNet if options.no_time else TimeUNet)
    denoiser, settings = train_or_load(options, options.out / "checkpoint.pt", make)
    noise_ids = [(options.seed, 0, index) for index in range(options.n)]
    samples = sample_images(denoiser, noise_ids, settings, options.steps, denoiser.device)
    save_samples(options.out, f"{settings.title}, {options.steps} steps", samples)


if __name__ == "__main__":
    tools.run_command(main)
