"""What does each choice of the recipe buy? From the lecture's own settings to ours, one at a time. Run by hand.

    python tests/measure_recipe.py [--minutes M | --images N] [--n N] [--seeds S [S ...]] [--rungs R [R ...]]

Every rung of the ladder trains for the same minutes of the clock (or on the same number of images), in a process of its
own, and makes the same number of samples, which the judges of measure_quality then judge. What is there already is not
done again, so it can be stopped, and go on later; and it is shown, too. The machine should have nothing else to do.

The lowest rung is the conditional model of the lecture (notebook 28), made of this project's classes: 28 × 28 pixels
padded to 32 × 32 in ±0.5, widths 32 to 256, batch norm, scale and shift in front of it, time from 0 to 1, prediction of
the noise on a cosine schedule, Adam with a learning rate that goes up to 0.01 and down in one cycle, batches of 512,
100 steps of DDIM. What differs: the middle has two blocks, the time embedding no batch norm, Adam's momentum stays as
it is, and gradients are clipped.
"""

import argparse
import copy
import importlib
import json
import math
import statistics
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from measure_quality import ARCHITECTURES, Baselines, Panel
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lesson_tools as tools

lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")


# %% The ladder
class Recipe(NamedTuple):
    """The lecture's settings, as they come."""

    batch_size: int = 512
    preset: str = "lecture"
    fast: bool = False  # bfloat16 if the device is fast with it, channels last
    edm: bool = False  # preconditioning, noise levels and sampler of lesson 3
    between: bool = False  # lesson 3's distribution of the noise levels, in the place of EDM's
    own_block: bool = False  # lesson 3's: group norm, scale and shift behind it, a silent start
    averaged: bool = False  # it is the average of the weights that samples
    muon: float = 0.0  # with lesson 3's schedule: AdamW's highest learning rate beside it
    attention: bool = False
    guidance: float = 0.0  # if any, labels are dropped in training
    below: float = math.inf  # sigma from which on it guides


# each with all the changes above it
CHANGES = {
    "the lecture's settings": {},
    "batches of 128": {"batch_size": 128},
    "a smaller net, on patches": {"preset": "small"},
    "bfloat16, channels last": {"fast": True},
    f"EDM, {lesson3.STEPS} steps of DPM-Solver++": {"edm": True},
    "noise levels nearer the middle": {"between": True},
    "group norm, scale and shift after it": {"own_block": True},
    "an average of the weights": {"averaged": True},
    "batches of 64": {"batch_size": 64},
    "Muon": {"muon": 2e-3},
    "attention": {"attention": True},
    "guidance": {"guidance": lesson4.GUIDANCE},
    "guidance below a noise level": {"below": lesson4.GUIDED_BELOW},
    "batches of 32, a third of the learning rates": {"batch_size": 32, "muon": 7e-4},
}
RECIPES = dict(zip(CHANGES, accumulate(CHANGES.values(), lambda before, change: before | change), strict=True))
RECIPES = {name: Recipe(**changes) for name, changes in RECIPES.items()}


class LectureBlock(lesson4.AttentionResBlock):
    """Scale and shift in front of the second norm, and no weights that start at zero."""

    def forward(self, x, embedding):
        second = self.conv2
        h = second.scale_shift(self.conv1(x), embedding)
        return self.shortcut(x) + second.conv(F.silu(second.norm(h)))


class SavedLectureBlock(lesson3.Saved, LectureBlock):
    pass


class LectureUNet(lesson4.CondUNet):
    """Lesson 4's network out of such blocks, with batch norm."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.BatchNorm2d(child.num_channels))
                elif hasattr(child, "reset_parameters"):
                    child.reset_parameters()

    def make_block(self, in_channels, out_channels, saved=False):
        kind = SavedLectureBlock if saved else LectureBlock
        return kind(in_channels, out_channels, self.groups, 4 * self.widths[0])


class LectureDenoiser(lesson3.Denoiser):
    """It predicts the noise: x0_hat = x - sigma · noise_hat. Images in [-1, 1] are halved on the way in; the share of
    the noise is then sin(π t / 2), of the image cos(π t / 2), with t from 0 to 1."""

    def scales(self, sigma):
        return torch.ones_like(sigma), -sigma, (4 + sigma**2).rsqrt()

    def c_noise(self, sigma):
        return 2 / math.pi * torch.atan(sigma / 2)


def sigma_of(t):
    """The inverse of the lecture's `c_noise`."""
    return 2 * torch.tan(math.pi / 2 * t)


def make_denoiser(recipe, settings, device):
    """A new denoiser of that recipe, with weights that the seed in the `RunSettings` decides."""
    torch.manual_seed(settings.seed)
    preset = lesson3.PRESETS[recipe.preset]
    levels = preset.attention_levels if recipe.attention else ()
    kind = lesson4.CondUNet if recipe.own_block else LectureUNet
    sizes = preset.patch**2, preset.widths, preset.depth, preset.groups
    network = kind(*sizes, levels, preset.head_dim, len(settings.classes))
    if not recipe.attention:
        network.middle[0].attention = nn.Identity()
    kind = lesson3.Denoiser if recipe.edm else LectureDenoiser
    precision = tools.choose_precision(device) if recipe.fast else None
    denoiser = kind(network, settings.sigma_data, preset.patch, precision)
    return denoiser.to(device, memory_format=torch.channels_last if recipe.fast else torch.contiguous_format)


def one_cycle(share):
    """The learning rate after a share of the training: from a 25th up for 30 % of it, then down to nothing; along
    cosines (Smith and Topin 2017, in PyTorch's form)."""
    low, at = (1 / 25, share / 0.3) if share < 0.3 else (0, (1 - share) / 0.7)
    return low + (1 - low) * (1 - math.cos(math.pi * at)) / 2


def draw_batches(recipe, settings, dataset):
    """Batches without end, as lesson 3's, or with t drawn evenly from 0 to 1."""
    batches = lesson3.draw_batches(*dataset, recipe.batch_size, settings.seed, range(10**9))
    if recipe.guidance:
        batches = lesson4.drop_labels(batches, len(settings.classes))
    for step, x0, sigma, noise, label in batches:
        if not recipe.edm:
            sigma = sigma_of(torch.rand(len(sigma), device=sigma.device).clamp(1e-3, 0.999))
        yield step, x0, sigma, noise, label


def train(recipe, settings, dataset, share_done):
    """The denoiser that samples, and how many images it was trained on. share_done(images seen): from 0 to 1."""
    denoiser = make_denoiser(recipe, settings, dataset[0].device)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    seen, schedule = 0, lesson3.schedule
    if recipe.muon:
        optimizers = lesson3.use_muon(denoiser.parameters(), recipe.muon)
    else:
        max_lr = 0.01 * (recipe.batch_size / 512) ** 0.5
        optimizers = [torch.optim.Adam(denoiser.parameters(), max_lr, eps=1e-5, fused=True)]

    def by_share(step, steps):
        share = min(share_done(seen), 1.0)
        return schedule(int(share * 10**6), 10**6) if recipe.muon else one_cycle(share)

    lesson3.schedule = by_share  # this process trains but once
    if not recipe.between:
        lesson3.P_MEAN, lesson3.P_STD = -1.2, 1.2
    for _ in lesson3.train(denoiser, ema, optimizers, draw_batches(recipe, settings, dataset), 10**9):
        seen += recipe.batch_size
        if share_done(seen) >= 1:
            break
    return (ema if recipe.averaged else denoiser).eval().requires_grad_(False), seen


def sample(recipe, settings, denoiser, n):
    """n images, `(n, 1, h, w)`, the classes in turn."""
    times, images, n_classes = torch.linspace(0.99, 0, 100), [], len(settings.classes)
    sigmas, method = (lesson3.noise_levels(), "dpm++") if recipe.edm else (sigma_of(times).tolist(), "ddim")
    for numbers in torch.arange(n).split(200):
        label = (numbers % n_classes).to(denoiser.device)
        noise_ids = [(0, i % n_classes, i // n_classes) for i in numbers.tolist()]
        denoise = lesson4.guide(denoiser, label, recipe.guidance, recipe.below)
        noise = lesson3.draw_noise(settings, noise_ids, denoiser.device)
        *_, (_, x, _) = lesson3.sample(denoise, noise, sigmas, method)
        images.append(lesson3.crop(x, settings.size).clamp(-1, 1).cpu())
    return torch.cat(images)


def measure_rung(recipe, seed, options, path):
    """Train, sample, and write what came out: images to path, and figures beside it."""
    device = tools.choose_device(options.device)
    train_set = tools.load_data("fashion-mnist", "train", options.data_dir)
    images = lesson3.pad(torch.from_numpy(train_set.images)[:, None], lesson3.PRESETS[recipe.preset]).to(device)
    sigma_data = round(images.float().std().item() / 127.5, 4)
    size, asked = train_set.images.shape[1:], ("CondUNet", recipe.preset, 1, recipe.batch_size, seed)
    settings = lesson3.RunSettings(*asked, train_set.name, len(images), train_set.classes, size, sigma_data)
    began = time.monotonic()

    def share_done(seen):
        return seen / options.images if options.images else (time.monotonic() - began) / (60 * options.minutes)

    denoiser, seen = train(recipe, settings, (images, torch.from_numpy(train_set.labels).to(device)), share_done)
    trained = time.monotonic()
    samples = sample(recipe, settings, denoiser, options.n)
    figures = {"seen": seen, "seconds": trained - began, "sampling": time.monotonic() - trained}
    tools.write_atomically(path.with_suffix(".json"), lambda file: file.write(json.dumps(figures).encode()))
    tools.write_atomically(path, lambda file: np.save(file, samples.numpy()))


# %% What came out
def collect(options):
    """Do what was asked for and isn't there yet, each in a process of its own. Yields name, figures and images of all
    that is there."""
    for rung, name in enumerate(RECIPES):
        for seed in options.seeds if rung in options.rungs else ():
            path = options.out / f"{rung:02}_seed_{seed}.npy"
            if not path.exists():
                print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
                subprocess.run([sys.executable, *sys.argv, "--only", str(rung), str(seed)], check=True)
        for path in sorted(options.out.glob(f"{rung:02}_seed_*.npy")):
            yield name, json.loads(path.with_suffix(".json").read_text()), torch.from_numpy(np.load(path))


def say(values, form):
    """Their median, and if there are several, from what to what they go."""
    median, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return median + f" ({low} to {high})" * (len(values) > 1)


def print_rows(rows):
    """A table in Markdown; rows: the figures of all seeds, and the judges' verdicts, by rung."""
    judges = "".join(f" Fréchet distance, judge `{name}` | right class |" for name in ARCHITECTURES)
    print(f"| | images seen | images/s | samples/s |{judges}\n|---|---|---|---|" + "---|---|" * len(ARCHITECTURES))
    for name, row in rows.items():
        seen, rate, drawn, verdicts = zip(*row, strict=True)
        cells = [say(seen, "{:,.0f}"), say(rate, "{:.0f}"), say(drawn, "{:.1f}")]
        for judge in ARCHITECTURES:
            cells += [say([verdict[judge].distances[0] for verdict in verdicts], "{:.3g}")]
            cells += [say([verdict[judge].right for verdict in verdicts], "{:.1%}")]
        print(f"| {name} | {' | '.join(cells)} |")


def plot(title, rows, shown):
    """A row of samples for each rung, with the images a second of its training, and its median distances beside it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.42 * len(rows) + 1), width_ratios=(5, 4))
    rates = [statistics.median(rate for _, rate, *_ in row) for row in rows.values()]
    names = [f"{name}: {rate:.0f}/s" for name, rate in zip(rows, rates, strict=True)]
    tools.plot_images(left, torch.cat(list(shown.values())), 10, names)
    left.set_aspect("auto")  # each row is as high as a step on the right
    for judge, color in zip(reversed(ARCHITECTURES), ("0.6", "black"), strict=True):
        values = [statistics.median(verdict[judge].distances[0] for *_, verdict in row) for row in rows.values()]
        right.plot(values, range(len(values)), "o-", color=color, label=f"judge {judge!r}")
    for y, value in enumerate(values):
        right.annotate(f"{value:.2g}", (value, y), xytext=(8, -3), textcoords="offset points", fontsize=8)
    right.margins(x=0.1)
    right.set(xscale="log", xlabel="Fréchet distance to the test images", yticks=[], ylim=(len(rows) - 0.5, -0.5))
    right.legend()
    figure.suptitle(f"{title} (at the left: training images a second)")
    return figure


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, number = parser.add_argument, tools.number
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", metavar="M", type=number(float, 1e-3, 1e5), default=5, help="(%(default)s)")
    budget.add_argument("--images", metavar="N", type=number(int, 1, 10**9), help="instead of minutes")
    add("--n", metavar="N", type=number(int, 20, 60_000), default=1000, help="samples (%(default)s)")
    add("--seeds", metavar="S", nargs="+", type=number(int, 0, 2**63), default=[0], help="(0)")
    last = len(RECIPES) - 1
    add("--rungs", metavar="R", nargs="+", type=number(int, 0, last), default=range(last + 1), help="(all)")
    add("--data-dir", metavar="DIR", help="folder with the four Fashion-MNIST files, also $FASHION_MNIST_DIR")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s: the fastest there is)")
    add("--out", metavar="DIR", type=tools.writable_folder, default=str(tools.RUNS / "recipe"), help="(%(default)s)")
    add("--only", nargs=2, type=int, help=argparse.SUPPRESS)  # rung and seed: this process is one of those it starts
    return parser


def main():
    options = make_parser().parse_args()
    budget = f"{options.images:,} images" if options.images else f"{options.minutes:g} minutes"
    options.out = tools.writable_folder(options.out / f"{budget}, {options.n}".replace(" ", "_").replace(",", ""))
    if options.only:
        rung, seed = options.only
        measure_rung(list(RECIPES.values())[rung], seed, options, options.out / f"{rung:02}_seed_{seed}.npy")
        return
    results = list(collect(options))
    train_set, test_set = (tools.load_data("fashion-mnist", split, options.data_dir) for split in data.SPLITS)
    panel = Panel(train_set, test_set, tools.choose_device(options.device))
    asked, rows, shown = torch.arange(options.n) % 10, {}, {}
    for name, figures, images in results:
        rates = figures["seen"], figures["seen"] / figures["seconds"], options.n / figures["sampling"]
        rows.setdefault(name, []).append((*rates, panel.judge(images, asked)))
        shown.setdefault(name, images[:10])
    title = f"From the lecture's settings to ours: {budget} of training each, {options.n:,} samples"
    print(f"\n{title}")
    print_rows(rows)
    for name, verdict in Baselines(train_set, options.n).judge(panel):
        said = ", ".join(f"{verdict[judge].distances[0]:.3g} before {judge!r}" for judge in ARCHITECTURES)
        print(f"{name}: {said}")
    tools.save_picture(plot(title, rows, shown), options.out / "recipe.png")


if __name__ == "__main__":
    tools.run_command(main)
