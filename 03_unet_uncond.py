"""Lesson 3: a U-Net learns to take noise away, and so to draw garments.

First the network without time, built in small steps; then with time; then what it is trained to do, and how samples
come out of it. Running it trains the unconditional model and draws from it (lecture section "unconditional model").

    python 03_unet_uncond.py [--no-time] [--epochs E] [--data-dir DIR] [--help]
"""

# %%
import argparse
import copy
import importlib
import math
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
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from data import NAMES, DataError, load

lesson1 = importlib.import_module("01_time_embedding")
Parser = lesson1.Parser
save_picture = lesson1.save_picture
timestep_embedding = lesson1.timestep_embedding


# %% Pre-activation convolution: norm and activation come before the convolution, so that a block's output is a plain
# sum of convolutions, neither squashed nor cut off at zero.
class PreActConv(nn.Module):
    """GroupNorm, SiLU, 3×3 convolution (He et al. 2016, "Identity Mappings in Deep Residual Networks").

    Group norm (Wu and He 2018) treats each image alone. Batch norm, which the lecture uses, shares its statistics among
    the images of a batch, and these have different noise levels: what it has averaged in training fits none of them.
    """

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x, scale=None, shift=None):
        """x: `(n, in_channels, h, w)`; scale and shift, `(n, in_channels, 1, 1)`, act on the normalized activations.
        Returns `(n, out_channels, h, w)`."""
        h = self.norm(x)
        if scale is not None:
            h = (1 + scale) * h + shift
        return self.conv(F.silu(h))


def zero_(layer):
    """Set a layer's weights and bias to zero, in place: the branch it ends starts silent. Returns the layer."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# %% The residual block: what two convolutions find is added to what came in.
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


# %% Saved: the up path needs what the down path computed. Mixed in *front* of a module class, `Saved` comes first in
# the order in which Python looks for `forward`, and `super().forward` is the module's own.
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


# %% The U-Net (Ronneberger et al. 2015)
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
        for level, new_width in enumerate(widths):
            for _ in range(depth):
                self.down.append(self.block(level, width, new_width, saved=True))
                width = new_width
                skips.append(width)
            if level < last:
                self.down.append(SavedConv(width, width, 3, stride=2, padding=1))
                skips.append(width)

        self.middle = nn.ModuleList([self.block("middle", width, width), self.block(None, width, width)])

        self.up = nn.ModuleList()
        for level, new_width in reversed(list(enumerate(widths))):
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
        return ()

    def training_label(self, label, generator):
        """The labels to train with, made of the right ones, `(n,)`: here, none."""

    @classmethod
    def from_preset(cls, preset, n_classes):
        """The network for a `Preset` (see below)."""
        return cls(preset.patch**2, preset.widths, preset.depth, preset.groups)

    def forward(self, x, time=None, label=None):
        """x and the result: `(n, channels, height, width)`; time `(n,)` float and label `(n,)` int64, where they are
        used. Raises ValueError where height or width can't be halved once for each level but the first."""
        step = 2 ** (len(self.widths) - 1)
        if x.shape[2] % step or x.shape[3] % step:
            raise ValueError(f"height and width must be multiples of {step}, got {x.shape[2]} × {x.shape[3]}")
        told = self.embed(time, label)
        try:
            h = self.conv_in(x)
            for layer in self.down:
                h = layer(h, *told) if isinstance(layer, ResBlock) else layer(h)
        finally:  # also where memory ran out on the way
            skips = [layer.take() for layer in (self.conv_in, *self.down)]
        for layer in self.middle:
            h = layer(h, *told)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), *told) if isinstance(layer, ResBlock) else layer(h)
        return self.conv_out(h)


# %% Time: each block learns a scale and a shift of its channels from the time. They act after the second norm; in front
# of it, the norm would take out again what is common to a group.
class TimeResBlock(ResBlock):
    """A residual block that takes activations and the embedding."""

    def __init__(self, in_channels, out_channels, groups, embedding_dim):
        super().__init__(in_channels, out_channels, groups)
        self.scale_shift = nn.Linear(embedding_dim, 2 * out_channels)

    def forward(self, x, embedding):
        """x: `(n, in_channels, h, w)`, embedding: `(n, embedding_dim)`. Returns `(n, out_channels, h, w)`."""
        scale, shift = rearrange(self.scale_shift(F.silu(embedding)), "n (two c) -> two n c 1 1", two=2)
        return self.shortcut(x) + self.conv2(self.conv1(x), scale, shift)


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
        """The embedding, `(n, embedding_dim)`, as a tuple of one. Raises ValueError where time isn't `(n,)`."""
        return (self.embed_time(timestep_embedding(time, self.widths[0])),)


# %% Noise, and the denoiser: x = x0 + sigma · noise, and the network learns to say what x0 was (Karras et al. 2022,
# "Elucidating the Design Space of Diffusion-Based Generative Models", EDM; lecture notebook 26).
TIME_SCALE = 1000  # ln(sigma) / 4 runs from about -1 to 1; the embedding is made for hundreds


class Denoiser(nn.Module):
    """A network with EDM's preconditioning (Karras et al. 2022, table 1): the network's input and its target both have
    variance one at every noise level, whatever the scale of x.

    network:    a UNet for images of `channels · patch²` channels.
    sigma_data: standard deviation of the training images.
    patch:      patches of this size become channels before the network, and pixels again after it: a quarter of the
                pixels at patch 2, and a quarter of the work.
    precision:  the network computes in this type (autocast) if given; everything around it stays as it is.
    """

    def __init__(self, network, sigma_data, patch=1, precision=None):
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.patch = patch
        self.precision = precision

    def scales(self, sigma):
        """c_skip, c_out and c_in of each sigma."""
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()

    def forward(self, x, sigma, label=None):
        """x: noisy images `(n, c, h, w)`; sigma: `(n,)`, positive; label: `(n,)` or None. Returns x0_hat like x."""
        c_skip, c_out, c_in = self.scales(sigma.view(-1, 1, 1, 1))
        time = TIME_SCALE * sigma.log() / 4
        with torch.autocast(x.device.type, self.precision, enabled=self.precision is not None):
            h = self.network(F.pixel_unshuffle(c_in * x, self.patch), time, label)
        return c_skip * x + c_out * F.pixel_shuffle(h.to(x.dtype), self.patch)


def denoising_loss(denoiser, x0, sigma, noise, label=None):
    """The squared error of x0_hat, weighted so that an untrained network's is about one at every sigma. Returns `(n,)`.

    The weight is 1 / c_out² (Karras et al. 2022, equation 8): the error of the network itself.
    """
    x0_hat = denoiser(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, label)
    _, c_out, _ = denoiser.scales(sigma)
    return (x0_hat - x0).square().mean(dim=(1, 2, 3)) / c_out**2


# %% Training
P_MEAN, P_STD = -1.2, 1.2  # of ln(sigma): most training happens at the noise levels where shapes are decided


def mix(*numbers):
    """One seed from several whole numbers, such that similar ones give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def draw_batch(images, labels, batch_size, seed, step, training_label):
    """The step's x0, sigma, noise and label: a function of seed and step, so that a resumed run sees the same."""
    generator = torch.Generator(images.device).manual_seed(mix(seed, step))
    on_device = {"generator": generator, "device": images.device}
    chosen = torch.randint(len(images), (batch_size,), **on_device)
    x0 = images[chosen].float() / 127.5 - 1
    sigma = (P_MEAN + P_STD * torch.randn(batch_size, **on_device)).exp()
    noise = torch.randn(x0.shape, **on_device)
    return x0, sigma, noise, training_label(labels[chosen], generator)


def learning_rate(step, steps, peak):
    """Up over the first 5 % of the steps, then straight down to zero."""
    warm_up = max(1, round(0.05 * steps))
    return peak * min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


def train(denoiser, average, optimizer, images, labels, start, steps, batch_size, peak, seed):
    """Train from step `start` to `steps`, and yield (step, loss) after each, the loss as a tensor on the device.

    images: uint8 `(n, c, h, w)`, labels: int64 `(n,)`, both on the device. average: a copy of the denoiser, which
    becomes the moving average of its weights. peak: the highest learning rate.
    """
    for step in range(start, steps):
        x0, sigma, noise, label = draw_batch(images, labels, batch_size, seed, step, denoiser.network.training_label)
        loss = denoising_loss(denoiser, x0, sigma, noise, label).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        optimizer.step()
        update_average(average, denoiser, step)
        yield step, loss.detach()


@torch.no_grad()
def update_average(average, denoiser, step):
    """Move the average towards the weights: it looks back over about a tenth of the steps so far, however many."""
    for slow, fast in zip(average.parameters(), denoiser.parameters(), strict=True):
        slow.lerp_(fast, min(1.0, 10 / (step + 1)))


# %% Sampling: from pure noise, in small steps, towards what the denoiser says.
SIGMA_MIN, SIGMA_MAX = 0.05, 80.0  # hardly to be seen, and nothing else to be seen


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
    `noise_levels`. method, all three on the line or curve from x to x0_hat in terms of ln(sigma):
    "ddim":  x keeps the direction in which x0_hat lies (Song et al. 2021; an Euler step). Error ~ 1 / steps.
    "dpm++": the same towards an x0_hat extrapolated from this and the last (Lu et al. 2022, DPM-Solver++(2M)). Error
             ~ 1 / steps², for the same one evaluation a step.
    "heun":  the mean of the slopes at both ends (Karras et al. 2022, algorithm 1). Error ~ 1 / steps², two evaluations.
    """
    if method not in ("ddim", "dpm++", "heun"):
        raise ValueError(f"method must be ddim, dpm++ or heun, got {method!r}")
    x = noise * sigmas[0]
    last = None  # the x0_hat of the step before, and that step's length in ln(sigma)
    for sigma, sigma_next in pairwise(sigmas):
        x0_hat = denoise(x, x.new_full((len(x),), sigma))
        yield sigma, x, x0_hat
        ratio = sigma_next / sigma
        target = x0_hat
        if sigma_next > 0 and method == "dpm++":
            length = -math.log(ratio)
            if last:
                target = x0_hat + length / (2 * last[1]) * (x0_hat - last[0])
            last = x0_hat, length
        if sigma_next > 0 and method == "heun":
            guess = x0_hat + ratio * (x - x0_hat)
            slope = (x - x0_hat) / sigma
            slope_next = (guess - denoise(guess, x.new_full((len(x),), sigma_next))) / sigma_next
            x = x + (sigma_next - sigma) * (slope + slope_next) / 2
        else:
            x = target + ratio * (x - target)
    yield 0.0, x, x


# %% Pictures
def grid(images, columns):
    """`(n, 1, h, w)` in [-1, 1] -> one picture `(rows h, columns w)`, row by row; what is missing is background."""
    missing = -len(images) % columns
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing), value=-1)
    return rearrange(images, "(rows columns) 1 h w -> (rows h) (columns w)", columns=columns)


def show_grid(images, columns, title, rows=(), heads=()):
    """A figure of images `(n, 1, h, w)` in a grid, with a name for each row and each column if given."""
    picture = grid(images, columns)
    height, width = images.shape[2:]
    scale = min(12, max(4, columns * 0.8)) / picture.shape[1]
    figure, axes = plt.subplots(
        figsize=(max(7, picture.shape[1] * scale + 1.5 * bool(rows)), picture.shape[0] * scale + 0.6)
    )
    axes.imshow(picture, vmin=-1, vmax=1)
    axes.set_xticks([(column + 0.5) * width - 0.5 for column in range(len(heads))], heads)
    axes.set_yticks([(row + 0.5) * height - 0.5 for row in range(len(rows))], rows)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(title)
    return figure


def show_denoising(states, title, shown=4, columns=10):
    """A film strip of `sample`'s states: what the sampler holds (scaled to be seen), and what x0 it expects, below."""
    frames = [states[round(i)] for i in np.linspace(0, len(states) - 1, min(columns, len(states)))]
    strips = []
    for image in range(min(shown, len(frames[0][1]))):
        strips += [x[image] / max(1.0, x[image].std().item()) for _, x, _ in frames]
        strips += [x0_hat[image] for _, _, x0_hat in frames]
    heads = [f"σ = {sigma:.2g}" for sigma, _, _ in frames]
    rows = ["x", "x0_hat"] * (len(strips) // len(frames) // 2)
    return show_grid(torch.stack(strips), len(frames), title, rows, heads)


def show_losses(losses, title):
    """The loss of each step, and its mean over the last 2 % of the steps."""
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(losses, color="0.8", linewidth=0.7, label="each step")
    axes.plot(range(window - 1, len(losses)), smooth, color="black", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="weighted squared error", title=title, ylim=(0, min(1.1, 1.1 * losses.max())))
    axes.legend()
    return figure


# %% Machinery: presets and the command line
class Preset(NamedTuple):
    widths: tuple[int, ...]  # channels of each level
    depth: int  # residual blocks a level
    groups: int  # of the group norms; of 16 channels each, or bfloat16 on a CPU is several times as slow in them
    patch: int  # side of the patches that the denoiser turns into channels
    attention_levels: tuple[int, ...]  # in lesson 4
    head_dim: int  # channels of a head there
    batch_size: int
    peak: float  # learning rate for that batch size
    epochs: float


PRESETS = {
    "small": Preset((48, 96), 1, 3, 2, (1,), 32, 64, 2e-3, 4.5),
    "lecture": Preset((32, 64, 128, 256), 2, 8, 1, (1, 2, 3), 8, 256, 2e-3, 25),
}


class UserError(Exception):
    """Something that the user can mend; the message is one line that says how."""


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
    parser = Parser(script, description)
    add = parser.add_argument
    add("--data", choices=NAMES, default="auto", help="data set (%(default)s: garments where Fashion-MNIST isn't had)")
    add("--data-dir", metavar="DIR", help="folder with the four IDX files, also $FASHION_MNIST_DIR")
    add("--preset", choices=PRESETS, help="network and settings (lecture on CUDA, small elsewhere)")
    add("--epochs", metavar="E", type=number(float, 1e-9, "a number above 0"), help="may be a fraction (preset's)")
    add("--batch-size", metavar="B", type=count, help="images a training step (preset's)")
    add("--seed", metavar="S", type=number(int, 0, "a whole number from 0 up"), default=0, help="(%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s: the fastest there is)")
    add("--restart", action="store_true", help="train anew, whatever checkpoint is there")
    add("--sample-only", action="store_true", help="draw from the checkpoint, don't train")
    add("--n", metavar="N", type=count, help="images to draw, without --class of each class (%(default)s)")
    add("--steps", metavar="S", type=count, default=18, help="network evaluations for a sample (%(default)s)")
    return parser


def choose_device(name):
    """The torch.device for --device. Raises UserError where it isn't there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device in there if there[device]]
    if name != "auto" and name not in available:
        raise UserError(f"--device {name}: there is none here, only {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def choose_preset(options):
    return options.preset or ("lecture" if options.device.type == "cuda" else "small")


def device_name(device):
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )


def choose_precision(device):
    """bfloat16 where the processor has instructions for it and is several times as fast with it; otherwise None."""
    capabilities = torch.cpu.get_capabilities()
    fast = {
        "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"),
    }
    return torch.bfloat16 if fast.get(device.type) else None


# %% Machinery: what a run is, and its checkpoint
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
        return f"{self.data}, {self.network}, {self.preset}, {self.epochs:g} epochs"


def plan(options, network_class, dataset, images):
    """The `Run` that the options ask for. images: those of the data set, uint8 tensor, padded."""
    preset = choose_preset(options)
    return Run(
        network_class.__name__,
        preset,
        options.epochs or PRESETS[preset].epochs,
        options.batch_size or PRESETS[preset].batch_size,
        options.seed,
        dataset.name,
        len(images),
        dataset.classes,
        dataset.images.shape[1:],
        images.float().std().item() / 127.5,
    )


def save_checkpoint(path, content):
    """All or nothing: an interrupted write leaves the old file as it was."""
    part = path.with_suffix(".part")
    torch.save(content, part)
    part.replace(path)


def load_checkpoint(path):
    """The checkpoint's content, or None where there is none. Raises UserError where it can't be read."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content | {"run": Run(**content["run"])}
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: damaged, or not a checkpoint of this lesson; --restart replaces it") from error


def check_same(path, run, asked):
    """Raise UserError where the checkpoint's run isn't the one that is asked for (a dictionary of `Run`'s fields)."""
    there = run._asdict()
    differing = [f"{name} {there[name]} there, {asked[name]} here" for name in asked if there[name] != asked[name]]
    if differing:
        raise UserError(
            f"{path} is of another run ({'; '.join(differing).replace('_', ' ')}), whose learning rate falls to zero "
            "at its end: --restart trains anew, --out DIR keeps both"
        )


@contextmanager
def stop_requests():
    """A list of the signals that came: Ctrl-C or SIGTERM asks to stop after a step, a second one stops at once."""
    requests = []

    def request(signal_number, frame):
        requests.append(signal_number)
        signal.signal(signal_number, signal.default_int_handler)

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# %% Machinery: a run from beginning to end
def pad(images, preset):
    """Background around `(n, c, h, w)`, as little as makes the sizes divisible as the network needs it."""
    unit = preset.patch * 2 ** (len(preset.widths) - 1)
    bottom, right = (-size % unit for size in images.shape[2:])
    return F.pad(images, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))


def crop(images, size):
    """The inverse of `pad`: the middle of `(n, c, h, w)`, of that size."""
    top, left = ((padded - wanted) // 2 for padded, wanted in zip(images.shape[2:], size, strict=True))
    return images[:, :, top : top + size[0], left : left + size[1]]


def get_denoiser(options, network_class, check=lambda run: None):
    """The denoiser that the options ask for, from its checkpoint or trained now, and its `Run`.

    check(run) is called before the work begins, and may raise UserError too.
    Raises UserError or DataError where something is missing or doesn't fit; SystemExit where training was interrupted.
    """
    path = options.out / "checkpoint.pt"
    checkpoint = None if options.restart else load_checkpoint(path)
    if options.sample_only:
        if checkpoint is None:
            raise UserError(f"{path}: no checkpoint there to draw from; run without --sample-only first")
        run = checkpoint["run"]
        typed = {name: getattr(options, name) for name in ("preset", "epochs", "batch_size") if getattr(options, name)}
        asked = {"network": network_class.__name__, **typed}
    else:
        dataset = load(options.data, "train", options.data_dir)
        images = pad(torch.from_numpy(dataset.images)[:, None], PRESETS[choose_preset(options)])
        run = plan(options, network_class, dataset, images)
        asked = run._asdict()
    if checkpoint:
        check_same(path, checkpoint["run"], asked)
    check(run)

    preset = PRESETS[run.preset]
    torch.manual_seed(run.seed)
    network = network_class.from_preset(preset, len(run.classes))
    precision = choose_precision(options.device)
    denoiser = Denoiser(network, run.sigma_data, preset.patch, precision)
    denoiser.to(options.device, memory_format=torch.channels_last)  # the order in which convolutions are fastest
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    if checkpoint:
        average.load_state_dict(checkpoint["average"])
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"data      {run.data}: {run.images:,} images, {run.size[0]} × {run.size[1]}, {len(run.classes)} classes")
    print(f"network   {run.network}, preset {run.preset}: {parameters:,} parameters")
    print(f"device    {device_name(options.device)}, {'bfloat16' if precision else 'float32'}")
    if not options.sample_only:
        labels = torch.from_numpy(dataset.labels)
        fit(run, denoiser, average, images.to(options.device), labels.to(options.device), checkpoint, path)
    return average, run


def fit(run, denoiser, average, images, labels, checkpoint, path):
    """Train, or go on training, under a progress bar; save a checkpoint now and then, at the end, and when stopped."""
    preset = PRESETS[run.preset]
    peak = preset.peak * (run.batch_size / preset.batch_size) ** 0.5  # as the noise of a batch's gradient falls
    optimizer = torch.optim.AdamW(denoiser.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    done, losses = 0, torch.full((run.steps,), math.nan, device=images.device)
    if checkpoint:
        done = checkpoint["step"]
        if done == run.steps:
            print(f"training  finished in an earlier run ({path}); --restart trains anew")
            return
        losses.copy_(checkpoint["losses"])
        denoiser.load_state_dict(checkpoint["denoiser"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    print(f"training  {run.steps:,} steps of {run.batch_size} images" + (f", from step {done:,}" if done else ""))

    def save():
        content = {"run": run._asdict(), "step": done, "losses": losses, "average": average.state_dict()}
        if done < run.steps:
            content |= {"denoiser": denoiser.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(path, content)

    total, begun = run.steps * run.batch_size, done * run.batch_size
    bar = tqdm(total=total, initial=begun, unit=" images", unit_scale=True, dynamic_ncols=True)
    training = train(denoiser, average, optimizer, images, labels, done, run.steps, run.batch_size, peak, run.seed)
    saved = time.monotonic()
    with bar, stop_requests() as requests:
        for step, loss in training:
            losses[step], done = loss, step + 1
            if done % 20 == 0:  # seldom, because it waits for a GPU
                bar.set_postfix(loss=f"{losses[done - 20 : done].mean().item():.3f}", refresh=False)
            bar.update(run.batch_size)
            if time.monotonic() > saved + 120:
                save()
                saved = time.monotonic()
            if requests:
                break
    save()
    if done < run.steps:
        again = shlex.join(["python", *(argument for argument in sys.argv if argument != "--restart")])
        print(f"stopped after step {done:,} of {run.steps:,}; all is saved in {path}. To go on:\n{again}")
        raise SystemExit(130)
    print(f"wrote {path}")
    save_picture(show_losses(losses.cpu().numpy(), f"{run.title}: the loss"), path.with_name("loss.png"))


def draw(make_denoise, starts, run, options, title, rows=(), columns=10, batch_size=200):
    """Sample, and write samples.png and samples.npy; after training also denoising.png, a film strip of four images.

    make_denoise(chosen): what `sample` needs for the images in that slice. starts: (seed, label, index) of each image.
    """
    shape = pad(torch.empty(1, 1, *run.size), PRESETS[run.preset]).shape[1:]
    noise = torch.stack([starting_noise(*start, shape) for start in starts])
    filmed = np.linspace(0, min(len(noise), batch_size) - 1, min(len(noise), 4)).round()
    images, film = [], []
    with tqdm(total=len(noise) * options.steps, unit=" evaluations", unit_scale=True, leave=False) as bar:
        for first in range(0, len(noise), batch_size):
            chosen = slice(first, first + batch_size)
            states = sample(make_denoise(chosen), noise[chosen].to(options.device), noise_levels(options.steps))
            for sigma, *state in states:
                x, x0_hat = (crop(part, run.size).cpu() for part in state)
                bar.update(len(x) if sigma else 0)
                if first == 0:
                    film.append((sigma, x[filmed], x0_hat[filmed]))
            images.append(x)
    images = torch.cat(images).clamp(-1, 1)
    save_picture(show_grid(images, columns, title, rows), options.out / "samples.png")
    np.save(options.out / "samples.npy", images.numpy())
    print(f"wrote {options.out / 'samples.npy'}")
    if not options.sample_only:
        save_picture(show_denoising(film, f"{title}: from noise to garment"), options.out / "denoising.png")


def start(parser, main):
    """Parse the command line and call main(options); what the user can mend is one line and exit status 2."""
    options = parser.parse_args()
    try:
        options.device = choose_device(options.device)
        main(options)
    except (UserError, DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


# %% Lesson 3 as a command
def main(options):
    denoiser, run = get_denoiser(options, UNet if options.no_time else TimeUNet)
    starts = [(options.seed, 0, index) for index in range(options.n)]
    draw(lambda chosen: denoiser, starts, run, options, f"{run.title}, {options.steps} steps")


if __name__ == "__main__":
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--no-time", action="store_true", help="the first U-Net, which isn't told the time")
    parser.set_defaults(n=100)
    start(parser, main)
