"""How fast are training and sampling, and how does the cost grow?

    python tests/measure_speed.py [--device D]            images/s, against diffusers and attention by hand
    python tests/measure_speed.py --questions             training, for the variants of the lecture's open questions
    python tests/measure_speed.py --growth [--device D]   the cost of larger images, wider networks, more attention

Three networks of the same structure, driven by lesson 3's `train` and samplers: ours, ours with lesson 2's `attention`
(the lecture's way), and diffusers' UNet2DModel with its defaults. The images are noise: they take as long as any.
Each table takes a few minutes on two CPU cores.
"""

import argparse
import copy
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from export_diffusers import make_unet
from measure_recipe import QUESTIONS, RECIPES, Recipe, describe_processor, make_denoiser
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lesson_tools as tools

lesson2 = importlib.import_module("02_attention")
lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")
PRESETS = lesson3.PRESETS


# %% The competitors
class Diffusers(nn.Module):
    """A UNet2DModel with our networks' signature."""

    n_classes = 10

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, time, label):
        return self.unet(x, time, label).sample


class Competitor(NamedTuple):
    """One of lesson 4's networks, and how it computes."""

    kind: str  # "ours", "by hand" or "diffusers"
    preset: str
    precision: torch.dtype | None = None  # None is float32
    size: int = 28  # of the images
    recipe: Recipe | None = None  # a row of `measure_recipe.py`, instead of these

    @property
    def name(self):
        return f"{self.kind}, {'bfloat16' if self.precision else 'float32'}"

    def make_denoiser(self, device):
        preset, classes = PRESETS[self.preset], tuple("0123456789")
        known = ("CondUNet", self.preset, 1, 64, 0, "noise", 256, classes, (self.size, self.size), 0.7)
        settings = lesson3.RunSettings(*known)
        if self.recipe:
            return make_denoiser(self.recipe, settings, device)
        if self.kind == "diffusers":
            return lesson3.Denoiser(Diffusers(make_unet(settings)), 0.7, preset.patch, self.precision).to(device)
        network = lesson4.make_network(preset, len(classes))
        for layer in network.modules():
            if self.kind == "by hand" and isinstance(layer, lesson2.MultiHeadSelfAttention):
                layer.attention_fn = lesson2.attention
        denoiser = lesson3.make_denoiser(network, settings, device)
        denoiser.precision = self.precision
        return denoiser

    def make_images(self, n, device):
        """Noise, uint8 `(n, 1, height, width)`, and labels `(n,)`."""
        images = torch.randint(256, (n, 1, self.size, self.size), dtype=torch.uint8)
        return lesson3.pad(images, PRESETS[self.preset]).to(device), torch.arange(n, device=device) % 10


def start_training(competitor, device, batch_size, use=lesson3.use_adamw):
    """A function that does one training step of lesson 3: noise, loss, backward, clipping, optimiser, average."""
    denoiser = competitor.make_denoiser(device)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    batches = lesson3.draw_batches(*competitor.make_images(256, device), batch_size, 0, range(10**6))
    batches = lesson4.drop_labels(batches, 10)
    return functools.partial(next, lesson3.train(denoiser, ema, use(denoiser.parameters(), 0.0), batches, 10**6))


def start_sampling(competitor, device, batch_size, steps, guidance, sampler=lesson3.sample_dpm):
    """A function that samples a batch in that many steps, as lesson 4 does."""
    denoiser = competitor.make_denoiser(device).eval().requires_grad_(False)
    images, label = competitor.make_images(batch_size, device)
    noise = torch.randn(images.shape, device=device)

    def run():
        denoise = functools.partial(lesson4.guide(denoiser, guidance), label=label)
        for _ in sampler(denoise, noise, lesson3.noise_levels(steps)):
            pass

    return run


# %% In turn
class Task(NamedTuple):
    """A line of a table."""

    name: str
    start: Callable  # start(device, batch_size): a function that works on a batch
    work: float = 1.0  # per image and call: 1 training step, or a share of sampling, such as 2 / 14


def interleave(runs, rounds=3, seconds=0.0, clock=time.perf_counter):
    """For each function of a dictionary, a list of the seconds it takes. A round calls each once, so other work on the
    machine slows all of them. There are at least `rounds` rounds, and more until `seconds` have passed."""
    taken = {name: [] for name in runs}
    began, done = clock(), 0
    while done < rounds or clock() - began < seconds:
        for name, run in runs.items():
            start = clock()
            run()
            taken[name].append(clock() - start)
        done += 1
    return taken


def compare(rates, others):
    """How many times as fast as the others, round by round: the median, the smallest and the largest."""
    ratios = [rate / other for rate, other in zip(rates, others, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def measure(tasks, device, batch_size, calls, rounds, seconds):
    """For each task, by name, a list of its images/s in each round. calls: how often a round calls each task."""

    def prepare(task):
        once = task.start(device, batch_size)

        def run():
            for _ in range(calls):
                once()
            getattr(torch, device.type).synchronize()

        run()  # warm up
        return run

    taken = interleave({task.name: prepare(task) for task in tasks}, rounds, seconds)
    return {task.name: [batch_size * calls * task.work / each for each in taken[task.name]] for task in tasks}


def print_table(title, rates):
    """Print the medians in images/s, and how many times as fast as the first each is."""
    print(f"\n{title}\n{'':44}images/s          times the first")
    first = next(iter(rates.values()))
    for name, each in rates.items():
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*compare(each, first))
        print(f"   {name:41}{statistics.median(each):8.1f}{ratio:>25}", flush=True)


def training_tasks(preset, precisions):
    """Diffusers in float32 first; attention by hand only in float32, as in the lecture; Muon last."""
    ours = [Competitor("ours", preset, precision) for precision in precisions]
    everyone = [each._replace(kind="diffusers") for each in ours] + [Competitor("by hand", preset), *ours]
    tasks = [Task(each.name, functools.partial(start_training, each)) for each in everyone]
    muon = functools.partial(start_training, ours[-1], use=lesson3.use_muon)
    return [*tasks, Task(f"{ours[-1].name}, Muon", muon)]


def row_tasks():
    """Today's recipe first, then the rows of docs/open_questions.md."""
    for name in ("today's recipe", "no attention", *QUESTIONS):
        competitor = Competitor("ours", "small", recipe=RECIPES[name])
        yield Task(name, functools.partial(start_training, competitor, use=lesson3.use_muon))


def sampling_tasks(precisions, measured=2):
    """The lecture's way first. Only two steps are measured, one of them guided, as lesson 4 guides half its steps."""

    def task(competitor, steps, **others):
        start = functools.partial(start_sampling, competitor, steps=measured, **others)
        return Task(f"{competitor.name}, {competitor.preset}, {steps} steps", start, measured / steps)

    tasks = [task(Competitor("by hand", "lecture"), 100, guidance=0, sampler=lesson3.sample_ddim)]
    for precision in precisions:
        ours = Competitor("ours", "small", precision)
        for each in (ours._replace(kind="diffusers"), ours):
            tasks.append(task(each, lesson3.STEPS, guidance=lesson4.GUIDANCE))
    return tasks


# %% How the cost grows
def growth_nets():
    """Names, presets and image sizes."""
    small, lecture = PRESETS["small"], PRESETS["lecture"]
    yield from ((f"small, {size} × {size}", small, size) for size in (28, 64, 128))
    yield "small, widths 96/192", small._replace(widths=(96, 192)), 28
    yield "small, 64 × 64, attention on both levels", small._replace(head_dim=16, attention_levels=(0, 1)), 64
    yield "lecture, 32 × 32", lecture, 32


def measure_cost(name, preset, size, device, precision, budget=2e10):
    """Parameters; multiply-adds and bytes kept for the backward pass, per image; images/s in training, in batches of
    about `budget` multiply-adds; that batch size."""
    PRESETS[name] = preset  # where lesson 3 looks presets up
    competitor, cpu = Competitor("ours", name, precision, size), torch.device("cpu")
    denoiser = competitor._replace(precision=None).make_denoiser(cpu)
    images, label = competitor.make_images(1, cpu)
    one, fused = (images.float(), torch.ones(1), label), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    count = {fused: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}  # otherwise the counter counts it as free
    with FlopCounterMode(display=False, custom_mapping=count) as counter:
        denoiser(*one)
    operations = counter.get_total_flops() // 2
    batch_size = min(64, max(1, round(budget / operations)))
    (rates,) = measure(
        [Task(name, functools.partial(start_training, competitor))], device, batch_size, 1, 3, 0
    ).values()
    kept = lesson2.saved_bytes(denoiser, *one)
    return lesson3.count_parameters(denoiser), operations, kept, statistics.median(rates), batch_size


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--questions", action="store_true", help="measure the open questions' variants instead")
    parser.add_argument("--growth", action="store_true", help="measure how the cost grows instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    count = tools.number(int, 1, 10**6)
    parser.add_argument("--batch-size", type=count, default=32, help="images per training step (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="minimum number of rounds (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = tools.choose_device(options.device)
    fast = tools.choose_precision(device)
    precisions = list(dict.fromkeys((None, fast)))
    print(f"{describe_processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.growth:
        print(f"{'':46}parameters   multiply-adds   kept for backward   images/s   in batches of")
        for name, preset, size in growth_nets():
            parameters, operations, kept, rate, batch_size = measure_cost(name, preset, size, device, fast)
            print(f"   {name:43}{parameters:10,}{operations / 1e6:14,.0f} M{kept / 1e6:17.1f} MB", end="")
            print(f"{rate:11.1f}{batch_size:16}", flush=True)
        return
    n, (calls, drawn, seconds) = options.batch_size, (20, 200, 5) if device.type == "cuda" else (1, 16, 0)
    tables = [(f"Training, preset {name}", training_tasks(name, precisions), n, calls) for name in ("small", "lecture")]
    tables.append(("Sampling", sampling_tasks(precisions), drawn, 1))
    if options.questions:
        tables = [("Training, the lecture's open questions", list(row_tasks()), n, calls)]
    for title, tasks, batch_size, calls in tables:
        rates = measure(tasks, device, batch_size, calls, options.rounds, seconds)
        print_table(f"{title}, batches of {batch_size}", rates)


if __name__ == "__main__":
    tools.run_command(main)
