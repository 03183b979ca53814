"""What each choice of the recipe is worth, all measured the same way.

    python tests/measure_recipe.py ROW [--seed S] [--images N | --minutes M] [--sweep]
    python tests/measure_recipe.py          the rows in `results.jsonl`, as Markdown tables, and a picture of the road

Each row is today's recipe with one thing changed. Every row trains on the same number of images, or for the same time,
and draws the same number of samples from the same noise, with guidance and without, for the classifiers to measure. A
finished row is a line of `results.jsonl`; a row that is there already, from the same kind of machine, is skipped.

The rows named "road" lead from the lecture's conditional model (notebook 28) to today's recipe, each with all the
changes before it. The first rebuilds the lecture's model from our classes: 28 × 28 pixels padded to 32 × 32 in ±0.5,
widths 32 to 256, batch norm after scale and shift, time from 0 to 1, noise prediction on a cosine schedule, Adam with a
learning rate that goes up to 0.01 and down again in one cycle, batches of 512, 100 sampling steps with new noise. Four
things differ: the middle has two blocks, the time embedding no batch norm, Adam's momentum is constant, and gradients
are clipped. (60,000 images in batches of 512 are 117 steps; the lecture trained for 25 epochs, about 2,900 steps.)
"""

import copy
import functools
import importlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import variants
from measure_quality import Panel, draw_samples
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lesson_tools as tools

lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")

RESULTS = Path(__file__).parent / "results.jsonl"
SWEEP = (0.8, 1.0, 1.2, 1.6)  # guidance values for a close comparison of distance and accuracy


# %% Rows
class Recipe(NamedTuple):
    """Today's recipe. A row changes part of it."""

    preset: str = "small"
    batch_size: int = 32
    optimizer: str = "muon"  # or "adamw"; "one cycle" is the lecture's Adam
    max_lr: float = 7e-4  # AdamW's highest; Muon's is ten times that
    momentum: float = 0.95  # Muon's
    weight_decay: float = 0.001  # Muon's
    fast: bool = True  # bfloat16 if the device is fast with it, channels last
    noise_prediction: bool = False  # the lecture's: cosine schedule, times from 0 to 1, no preconditioning or weights
    levels: tuple[float, float] = (lesson3.P_MEAN, lesson3.P_STD)  # mean and deviation of ln(sigma) in training
    averaged: bool = True  # sample with the averaged weights, not the last ones
    drop_labels: bool = True  # one in ten in training
    ddpm: bool = False  # the lecture's 100 steps
    attention_levels: tuple[int, ...] | None = None  # instead of the preset's, with heads of 16 channels
    changes: tuple[Callable, ...] = ()  # to the network, from `variants`


LECTURE = {"preset": "lecture", "batch_size": 512, "optimizer": "one cycle", "max_lr": 0.01, "fast": False}
LECTURE |= {"noise_prediction": True, "levels": (-1.2, 1.2), "averaged": False, "drop_labels": False, "ddpm": True}
LECTURE["changes"] = variants.no_zero_start, variants.batch_norm, variants.shift_first, variants.no_attention
ROAD = {  # each with all the changes above it
    "road: the lecture's settings": LECTURE,
    "road: batches of 128": {"batch_size": 128, "max_lr": 0.005},
    "road: a small network, on patches": {"preset": "small"},
    "road: bfloat16, channels last": {"fast": True},
    "road: EDM, 14 steps of DPM-Solver++": {"noise_prediction": False, "ddpm": False},
    "road: noise levels closer to the middle": {"levels": (-1.0, 1.0)},
    "road: group norm before scale and shift, zero start": {"changes": (variants.no_attention,)},
    "road: Muon and an average, batches of 32": {
        "optimizer": "muon",
        "max_lr": 7e-4,
        "averaged": True,
        "batch_size": 32,
    },
    "road: attention": {"changes": ()},
    "road: dropped labels, for guidance": {"drop_labels": True},
}
CHANGES = {
    "today's recipe": {},
    "AdamW, 0.0005": {"optimizer": "adamw", "max_lr": 5e-4},
    "AdamW, 0.001": {"optimizer": "adamw", "max_lr": 1e-3},
    "AdamW, 0.002": {"optimizer": "adamw", "max_lr": 2e-3},
    "AdamW, 0.004": {"optimizer": "adamw", "max_lr": 4e-3},
    "Muon, rates × 2/3": {"max_lr": 4.7e-4},
    "Muon, rates × 3/2": {"max_lr": 1.05e-3},
    "Muon, momentum 0.9": {"momentum": 0.9},
    "Muon, momentum 0.98": {"momentum": 0.98},
    "Muon, weight decay 0.1": {"weight_decay": 0.1},
    "labels never dropped": {"drop_labels": False},
    "the lecture's denoiser": {"noise_prediction": True},
    "EDM's noise levels": {"levels": (-1.2, 1.2)},
    "batch norm": {"changes": (variants.batch_norm,)},
    "scale and shift before the norm": {"changes": (variants.shift_first,)},
    "the last weights, no average": {"averaged": False},
    "no attention": {"changes": (variants.no_attention,)},
    "no time": {"changes": (variants.sines(scale=torch.zeros_like),)},
    "batches of 64, 0.00067": {"batch_size": 64, "max_lr": 6.7e-4},
    "batches of 64, 0.001": {"batch_size": 64, "max_lr": 1e-3},
    "batches of 64, 0.0015": {"batch_size": 64, "max_lr": 1.5e-3},
    "batches of 128, 0.0014": {"batch_size": 128, "max_lr": 1.4e-3},
    "the lecture's network": {"preset": "lecture"},
    "float32": {"fast": False},
}
QUESTIONS = {  # that the lecture leaves open, after a control; times are -1151 to 1096 unless a row says otherwise
    "weights drawn again": {"changes": (variants.drawn_again,)},
    **{f"max_period {period}": {"changes": (variants.sines(period),)} for period in (10, 100, 1000)},
    "times -4.6 to 4.4, max_period 10": {"changes": (variants.sines(10, variants.to_ln_sigma),)},
    "times -4.6 to 4.4": {"changes": (variants.sines(10_000, variants.to_ln_sigma),)},
    "times 0 to 1, max_period 10": {"changes": (variants.sines(10, variants.to_unit),)},
    "times 0 to 1": {"changes": (variants.sines(10_000, variants.to_unit),)},
    "times 0 to 1, batch norm": {"changes": (variants.lecture_time,)},
    "a learned table of times": {"changes": (variants.learned_table,)},
    "ln(sigma) alone": {"changes": (variants.ln_sigma_alone,)},
    "skips added": {"changes": (variants.skips_added,)},
    "skips cut": {"changes": (variants.skips_cut,)},
    "down: average pooling, convolution": {"changes": (variants.pool_down,)},
    "down: average pooling": {"changes": (variants.pool_alone,)},
    "down: every second pixel": {"changes": (variants.every_second_pixel,)},
    "up: transposed convolution": {"changes": (variants.transposed_up,)},
    "heads of 16: in the middle": {"attention_levels": ()},
    "heads of 16: and on the lower level": {"attention_levels": (1,)},
    "heads of 16: and on both levels": {"attention_levels": (0, 1)},
    "axial attention": {"changes": (variants.axial,)},
    "two attention layers in a row": {"changes": (variants.two_layers,)},
    "learned positions": {"changes": (variants.learned_positions,)},
}
CHANGES |= QUESTIONS
RECIPES = {name: Recipe()._replace(**changes) for name, changes in CHANGES.items()}
built = accumulate(ROAD.values(), lambda before, change: before | change)
RECIPES |= {name: Recipe()._replace(**changes) for name, changes in zip(ROAD, built, strict=True)}


# %% What they are made of
class NoiseDenoiser(lesson3.Denoiser):
    """Predicts the noise: x0_hat = x - sigma · noise_hat. Images in [-1, 1] are halved on the way in: the network gets
    cos(π t / 2) · x0 / 2 + sin(π t / 2) · noise, with t from 0 to 1."""

    def scales(self, sigma):
        return torch.ones_like(sigma), -sigma, (4 + sigma**2).rsqrt()

    def c_noise(self, sigma):
        return 2 / math.pi * torch.atan(sigma / 2)


def sigma_of(t):
    """The noise level at time t, the inverse of `NoiseDenoiser.c_noise`."""
    return 2 * torch.tan(math.pi / 2 * t)


def make_denoiser(recipe, settings, device):
    """A new denoiser for this recipe; the seed in the `RunSettings` determines its weights."""
    torch.manual_seed(settings.seed)
    preset = lesson3.PRESETS[recipe.preset]
    if recipe.attention_levels is not None:
        preset = preset._replace(attention_levels=recipe.attention_levels, head_dim=16)
    network = lesson4.make_network(preset, len(settings.classes))
    for change in recipe.changes:
        change(network)
    kind = NoiseDenoiser if recipe.noise_prediction else lesson3.Denoiser
    precision = tools.choose_precision(device) if recipe.fast else None
    denoiser = kind(network, settings.sigma_data, preset.patch, precision)
    return denoiser.to(device, memory_format=torch.channels_last if recipe.fast else torch.contiguous_format)


# %% Training and sampling
def one_cycle(share):
    """The learning rate after a share of the training, relative to its maximum: up from 1/25 for the first 30 %, then
    down to zero, both along cosines (Smith and Topin 2017, in PyTorch's form)."""
    low, at = (1 / 25, share / 0.3) if share < 0.3 else (0, (1 - share) / 0.7)
    return low + (1 - low) * (1 - math.cos(math.pi * at)) / 2


def draw_batches(recipe, settings, dataset):
    """Endless batches: lesson 3's, or with t drawn uniformly from 0 to 1."""
    batches = lesson3.draw_batches(*dataset, recipe.batch_size, settings.seed, range(10**9))
    if recipe.drop_labels:
        batches = lesson4.drop_labels(batches, len(settings.classes))
    for step, x0, sigma, noise, label in batches:
        if recipe.noise_prediction:
            sigma = sigma_of(torch.rand(len(sigma), device=sigma.device).clamp(1e-3, 0.999))
        yield step, x0, sigma, noise, label


def train(recipe, settings, dataset, share_done):
    """The denoiser to sample with, and how many images it saw. share_done(images seen): from 0 to 1, the share done."""
    denoiser = make_denoiser(recipe, settings, dataset[0].device)
    ema, seen, schedule = copy.deepcopy(denoiser).requires_grad_(False), 0, lesson3.schedule
    if recipe.optimizer == "one cycle":
        optimizers = [torch.optim.Adam(denoiser.parameters(), recipe.max_lr, eps=1e-5, fused=True)]
    else:
        use = {"muon": lesson3.use_muon, "adamw": lesson3.use_adamw}[recipe.optimizer]
        optimizers = use(denoiser.parameters(), recipe.max_lr)
    if recipe.optimizer == "muon":
        optimizers[0].param_groups[0].update(momentum=recipe.momentum, weight_decay=recipe.weight_decay)

    def by_share(step, steps):
        share = min(share_done(seen), 1.0)
        return one_cycle(share) if recipe.optimizer == "one cycle" else schedule(int(share * 10**6), 10**6)

    lesson3.schedule = by_share  # never undone: a process trains only once
    lesson3.P_MEAN, lesson3.P_STD = recipe.levels
    for _ in lesson3.train(denoiser, ema, optimizers, draw_batches(recipe, settings, dataset), 10**9):
        seen += recipe.batch_size
        if share_done(seen) >= 1:
            break
    if recipe.averaged:
        measure_batch_norm(ema, draw_batches(recipe, settings, dataset))
    return (ema if recipe.averaged else denoiser).eval().requires_grad_(False), seen


@torch.no_grad()
def measure_batch_norm(denoiser, batches, n=100):
    """Averaged weights need batch-norm statistics of their own: those of n training batches."""
    norms = [module for module in denoiser.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    denoiser.train()
    for (_, x0, sigma, noise, label), _ in zip(batches, range(n), strict=False):
        denoiser(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, label)


@torch.no_grad()
def sample_ddpm(denoise, noise, sigmas):
    """The lecture's way from noise to images: each step mixes x and the clamped x0_hat, and adds new noise (DDIM with
    eta = 1, which is DDPM's step). Its pixel values are half of ours, so its clamp to ±1 is ±2 here."""
    x = sigmas[0] * noise
    for sigma, sigma_next in pairwise(sigmas):
        x0_hat, kept = denoise(x, sigma).clamp(-2, 2), (sigma_next / sigma) ** 2
        x = x0_hat + kept * (x - x0_hat) + sigma_next * (1 - kept) ** 0.5 * torch.randn_like(x)
    return x


def sample(recipe, settings, denoiser, n, guidance, below=lesson4.GUIDED_BELOW):
    """n images, `(n, 1, h, w)`, the classes in turn."""
    if not recipe.ddpm:
        return draw_samples(denoiser, settings, n, guidance=guidance, below=below)[0]
    sigmas, images, n_classes = sigma_of(torch.linspace(0.99, 0, 100)).tolist(), [], len(settings.classes)
    torch.manual_seed(0)
    for numbers in torch.arange(n).split(200):
        label = (numbers % n_classes).to(denoiser.device)
        denoise = functools.partial(lesson4.guide(denoiser, guidance, below), label=label)
        noise_ids = [(0, i % n_classes, i // n_classes) for i in numbers.tolist()]
        x = sample_ddpm(denoise, lesson3.draw_noise(settings, noise_ids, denoiser.device), sigmas)
        images.append(lesson3.crop(x, settings.size).clamp(-1, 1).cpu())
    return torch.cat(images)


@torch.no_grad()
def measure_loss(denoiser, sigma_data, images, labels, size):
    """Lesson 3's loss, with its noise levels and weights, for any denoiser, on uint8 images `(n, 1, h, w)`. The border
    around `size` doesn't count."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation = Recipe().levels
    sigma = (mean + deviation * torch.randn(len(images), generator=generator)).exp()
    x0, noise, losses = images / 127.5 - 1, torch.randn(images.shape, generator=generator), []
    for chosen in torch.arange(len(images)).split(250):
        level, clean, label = (part[chosen].to(denoiser.device) for part in (sigma, x0, labels))
        c_out = lesson3.Denoiser(None, sigma_data).scales(level)[1].view(-1, 1, 1, 1)
        x = clean + level.view(-1, 1, 1, 1) * noise[chosen].to(denoiser.device)
        error = lesson3.crop((denoiser(x, level, label) - clean) / c_out, size)
        losses.append(error.square().mean(dim=(1, 2, 3)))
    return float(torch.cat(losses).mean())


# %% A row
def describe_machine(device):
    """What the figures depend on: device, precision, threads, and the project's commit."""
    precision = "bfloat16" if tools.choose_precision(device) else "float32"  # of all rows that don't say otherwise
    known = {"processor": describe_processor(device), "precision": precision}
    return known | {"threads": torch.get_num_threads(), "commit": describe_commit(RESULTS)}


def describe_commit(results):
    """The commit's short hash, with "-dirty" if any file but the results has changed since."""

    def git(*arguments):
        command = ["git", "-C", results.parent, *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ":/", f":!{results.name}")
    return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed)


def describe_processor(device):
    """The processor's name and, on a CPU, its widest instructions."""
    processor = platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    elif (cpuinfo := Path("/proc/cpuinfo")).exists():
        (processor, *_) = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if "model name" in line]
        flags = getattr(torch.cpu, "get_capabilities", dict)()
        kinds = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512_f": "AVX-512", "avx2": "AVX2"}
        processor += next((f", {kind}" for flag, kind in kinds.items() if flags.get(flag)), "")
    return processor


def measure_row(options):
    """Train, sample and measure. Returns the figures for a line of `results.jsonl`, as a dictionary."""
    recipe, device = RECIPES[options.row], tools.choose_device(options.device)
    train_set, test_set = (tools.load_data("fashion-mnist", split, options.data_dir) for split in data.SPLITS)
    preset = lesson3.PRESETS[recipe.preset]
    images, unseen = (lesson3.pad(torch.from_numpy(part.images)[:, None], preset) for part in (train_set, test_set))
    sigma_data = round(images.float().std().item() / 127.5, 4)
    size, known = train_set.images.shape[1:], ("CondUNet", recipe.preset, 1, recipe.batch_size, options.seed)
    settings = lesson3.RunSettings(*known, train_set.name, len(images), train_set.classes, size, sigma_data)
    began = time.monotonic()

    def share_done(seen):
        return seen / options.images if options.images else (time.monotonic() - began) / (60 * options.minutes)

    dataset = images.to(device), torch.from_numpy(train_set.labels).to(device)
    denoiser, seen = train(recipe, settings, dataset, share_done)
    line, labels = {"seen": seen, "parameters": lesson3.count_parameters(denoiser)}, torch.from_numpy(test_set.labels)
    weighting = float(torch.from_numpy(train_set.images).float().std() / 127.5)  # the same whatever the padding
    line["loss"] = round(measure_loss(denoiser, weighting, unseen[:2000], labels[:2000], size), 5)
    panel, wanted = Panel(test_set, device), torch.arange(options.n) % len(train_set.classes)
    ways = {"guided": (lesson4.GUIDANCE,), "unguided": (0,)} if recipe.drop_labels else {"unguided": (0,)}
    if options.sweep:
        ways |= {f"guidance {w:g}": (w,) for w in SWEEP}
    if recipe == Recipe():
        ways["guided at all levels"] = (lesson4.GUIDANCE, math.inf)
    for way, guidance in ways.items():
        qualities = panel.measure(sample(recipe, settings, denoiser, options.n, *guidance), wanted)
        line[way] = {name: [round(found.distance, 3), round(found.accuracy, 4)] for name, found in qualities.items()}
    return line


# %% Results
def read_results():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def kind(line):
    """Only lines of the same kind can be compared."""
    return tuple(line[key] for key in ("images", "minutes", "n", "processor", "precision", "threads"))


def value(line, what):
    """A line's "loss", or its "guided" or "unguided" distance in the features of `residual`."""
    return line["loss"] if what == "loss" else line[what]["residual"][0]


def changes(lines, today, what):
    """By how many percent each line's value differs from that of today's recipe with the same seed. today: by seed."""
    pairs = [(line, today[line["seed"]]) for line in lines if what in line and line["seed"] in today]
    return [100 * (value(line, what) / value(other, what) - 1) for line, other in pairs]


def print_table(lines):
    """Print lines of one kind as a Markdown table. Changes are in percent. Brackets hold the smallest and the largest
    value."""
    titles = {"loss": "loss | change", "guided": "guided: distance | change | accuracy"}
    titles["unguided"] = titles["guided"].replace("guided", "unguided")
    print(f"| | seeds | {' | '.join(titles.values())} | parameters |\n{11 * '|---'}|")
    today = {line["seed"]: line for line in lines if line["row"] == "today's recipe"}
    for name in RECIPES:
        rows = [line for line in lines if line["row"] == name]
        if not rows:
            continue
        cells = [name, ", ".join(str(line["seed"]) for line in rows)]
        for what in titles:
            there = [line for line in rows if what in line]
            cells += [spread([value(line, what) for line in there], "{:.4g}")]
            cells += [spread(changes(there, today, what), "{:+z.1f}")]
            if what != "loss":
                cells += [spread([100 * line[what]["residual"][1] for line in there], "{:.1f} %")]
        print(f"| {' | '.join(cells)} | {rows[0]['parameters']:,} |")


def spread(values, form):
    """Their mean and, if there are several, the smallest and the largest."""
    if not values:
        return "–"
    mean, low, high = (form.format(value) for value in (statistics.mean(values), min(values), max(values)))
    return mean + f" ({low} to {high})" * (len(values) > 1)


def plot_road(lines):
    """Plot the distance of each row of the road, guided if measured. lines: of one kind."""
    found = {line["row"]: line.get("guided", line["unguided"])["residual"][0] for line in lines}
    steps = [step for step in ROAD if step in found]
    distances, places = [found[step] for step in steps], range(len(steps))
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(steps) + 1), layout="constrained")
    axes.plot(distances, places, "ko-", markersize=4)
    for place, distance in zip(places, distances, strict=True):
        axes.annotate(f"{distance:.3g}", (distance, place), (7, -10), textcoords="offset points")
    names = [step.removeprefix("road: ") for step in steps]
    axes.set_yticks(places, [names[0], *(f"+ {name}" for name in names[1:])])
    axes.invert_yaxis()
    limits = 0.8 * min(distances), 2 * max(distances)
    axes.set(xscale="log", xlabel="Fréchet distance, on a logarithmic scale", xlim=limits)
    axes.set_xticks([])
    axes.minorticks_off()
    axes.margins(y=0.1)
    images, minutes, n, _, _, threads = kind(lines[0])
    budget = f"{images:,} images" if images else f"{minutes:g} minutes"
    subtitle = f"{budget} of training on {threads} CPU thread{'s' * (threads > 1)} each; {n:,} samples"
    tools.set_title(figure, f"From the lecture's settings to ours, step by step\n{subtitle}")
    return figure


def make_parser():
    parser = tools.make_parser(__file__, __doc__)
    add, number = parser.add_argument, tools.number
    add("row", nargs="?", metavar="ROW", help="row to measure (default: print the tables): " + "; ".join(RECIPES))
    add("--seed", metavar="S", type=number(int, 0, 2**63), default=0, help="(default: %(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--images", metavar="N", type=number(int, 1, 10**9), default=60_000, help="(default: 60,000)")
    budget.add_argument("--minutes", metavar="M", type=number(float, 1e-3, 1e5), help="train this long instead")
    add("--n", metavar="N", type=number(int, 20, 60_000), default=4000, help="samples (default: %(default)s)")
    add("--sweep", action="store_true", help="also sample with guidance " + ", ".join(f"{w:g}" for w in SWEEP))
    add("--data-dir", metavar="DIR", help="folder with Fashion-MNIST's four files (default: $FASHION_MNIST_DIR)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda if available, else cpu")
    return parser


def main():
    options = make_parser().parse_args()
    options.images = None if options.minutes else options.images
    results = read_results()
    if options.row is None:
        for each in sorted({kind(line) for line in results}, key=str):
            lines = [line for line in results if kind(line) == each]
            print(f"\n{each}")
            print_table(lines)
            if any(line["row"] in ROAD for line in lines):
                tools.save_picture(options.out / "road.png", plot_road, lines)
        return
    if options.row not in RECIPES:
        raise tools.UserError(f"{options.row!r}: must be one of {', '.join(RECIPES)}")
    machine = describe_machine(tools.choose_device(options.device))
    asked = {"row": options.row, "seed": options.seed, "images": options.images, "minutes": options.minutes}
    asked |= {"n": options.n} | machine
    if any((line["row"], line["seed"], kind(line)) == (options.row, options.seed, kind(asked)) for line in results):
        print(f"{options.row}, seed {options.seed}: already in {RESULTS.name}")
        return
    line = asked | measure_row(options)
    with RESULTS.open("a") as file:
        print(json.dumps(line), file=file)
    print(json.dumps(line))


if __name__ == "__main__":
    tools.run_command(main)
