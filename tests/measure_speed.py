"""How fast is it, beside what else there is, and beside what the machine could do? Run by hand.

    python tests/measure_speed.py [--json] [--device D]            training and sampling, ours and others
    python tests/measure_speed.py --growth [--json] [--device D]   what larger images, nets and attention cost

Three networks of the same structure, driven by the same code (lesson 3's `train` and `sample`): ours, ours with
attention by hand (lesson 2's `ExplicitSelfAttention`, the lecture's way), and diffusers' UNet2DModel, which comes in
float32 with its weights in contiguous order and chooses its attention itself. The images are noise; time doesn't care.

It takes less than five minutes on two CPU cores, --growth less than three.
"""

import argparse
import copy
import functools
import gc
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch.profiler is not to tell when it starts and stops

import diffusers
import torch
from export_diffusers import make_unet
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
lesson2 = importlib.import_module("02_attention")
lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")
CondUNet = lesson4.CondUNet
PRESETS = lesson3.PRESETS
TimeUNet = lesson3.TimeUNet


# %% The competitors
class Diffusers(nn.Module):
    """A UNet2DModel with our network's interface, so that the same code trains it and samples from it."""

    training_label = CondUNet.training_label

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.n_classes = (unet.config.num_class_embeds or 1) - 1

    def forward(self, x, time, label=None):
        """x: `(n, channels, h, w)`, time: `(n,)`, label: `(n,)`, left out where the model has no classes."""
        return self.unet(x, time, label if self.unet.config.num_class_embeds else None).sample


def name_precision(precision):
    return "bfloat16" if precision else "float32"


class Competitor(NamedTuple):
    """A network and how it computes."""

    kind: str  # "ours", "by hand" or "diffusers"
    network_class: type  # CondUNet; TimeUNet has no attention
    preset: str
    precision: torch.dtype | None = None  # None is float32
    size: int = 28  # of the images, before they are padded as the preset needs it

    @property
    def name(self):
        return f"{self.kind}, {name_precision(self.precision)}"

    @property
    def run(self):
        """What lesson 3 wants to know of a network."""
        name, classes = self.network_class.__name__, tuple("0123456789")
        return lesson3.Run(name, self.preset, 1, 64, 0, "noise", 256, classes, (self.size, self.size), 0.7)

    def make_denoiser(self, device):
        if self.kind == "diffusers":
            network, patch = Diffusers(make_unet(self.run)), PRESETS[self.preset].patch
            return lesson3.Denoiser(network, self.run.sigma_data, patch, self.precision).to(device)
        denoiser = lesson3.make_denoiser(self.run, self.network_class, device)
        denoiser.precision = self.precision
        if self.kind == "by hand":
            for layer in denoiser.modules():
                if isinstance(layer, lesson2.MultiHeadSelfAttention):
                    layer.__class__ = lesson2.ExplicitSelfAttention
        return denoiser


def synchronize(device):
    """Wait until the device has done all it was given; before that, the clock tells nothing."""
    getattr(torch, device.type).synchronize()


def start_training(competitor, device, batch_size, steps=1, muon=False):
    """A function that trains for some more steps and waits for them to end. A step is lesson 3's: noise, loss,
    backward, clipping, optimiser, moving average. The optimiser is AdamW, or lesson 3's pair with Muon."""
    denoiser = competitor.make_denoiser(device)
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    adam = functools.partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    optimizers = lesson3.make_optimizers(denoiser, 0.0) if muon else [adam(denoiser.parameters(), 0.0)]
    for parameter in denoiser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()  # what they keep of each parameter is there now, and its memory counts from the start
    images = torch.randint(256, (256, 1, competitor.size, competitor.size), dtype=torch.uint8)
    images = lesson3.pad(images, PRESETS[competitor.preset]).to(device)
    labels = torch.randint(10, (len(images),), device=device)
    training = lesson3.train(denoiser, average, optimizers, images, labels, 0, 10**6, batch_size, 0)

    def run():
        for _ in range(steps):
            next(training)
        synchronize(device)

    return run


def start_sampling(competitor, device, batch_size, evaluations, guidance, method="dpm++"):
    """A function that draws a batch with so many evaluations of the network, as lesson 4 does, and waits for it."""
    denoiser = competitor.make_denoiser(device).eval().requires_grad_(False)
    noise = lesson3.draw_noise(competitor.run, device, [(0, 0, i) for i in range(batch_size)])
    label = torch.arange(batch_size, device=device) % 10

    def run():
        denoise = lesson4.guide(denoiser, label, guidance)
        for _ in lesson3.sample(denoise, noise, lesson3.noise_levels(evaluations), method):
            pass
        synchronize(device)

    return run


# %% What is measured
# The counter knows the fused attention of GPUs; that of CPUs, which does the same, it takes for free. A formula
# is given the shapes of an operation's arguments.
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FUSED = {
    ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATTENTION_BACKWARD: lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v),
}


def count_operations(run):
    """Floating-point operations of convolutions, matrix products and attention; a multiply-add is two of them. Fused
    attention computes its scores a second time for the backward pass, so it has more of them than attention by hand."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        run()
    return counter.get_total_flops()


def track_memory(work, device):
    """What work() returns, and the most bytes that tensors made in it held at a time (None where nobody counts them).

    This is what PyTorch's allocator gives out: on a CPU neither the program itself nor a kernel's own scratch space.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return work(), torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        return work(), None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = sorted(profiler.events(), key=lambda event: event.time_range.end)
    return result, max(accumulate(event.self_cpu_memory_usage for event in events), default=0)


def interleave(runs, rounds=3, seconds=0.0, clock=time.perf_counter):
    """The seconds that each function of a dictionary takes, a list by name. A round calls each once, so that whatever
    else the machine does meets all of them; there are at least so many rounds, and more until `seconds` have passed."""
    taken = {name: [] for name in runs}
    began, done = clock(), 0
    while done < rounds or clock() - began < seconds:
        for name, run in runs.items():
            start = clock()
            run()
            taken[name].append(clock() - start)
        done += 1
    return taken


def summarize(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(rates, others):
    """How many times as fast, round by round: rates and others are images/s in the same rounds."""
    return summarize([rate / other for rate, other in zip(rates, others, strict=True)])


def measure_machine(device, precision, seconds=1.0):
    """Operations per second of a large matrix product, the fastest of several."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=precision or torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # what convolutions in float32 may use

    def run():
        torch.mm(a, b)
        synchronize(device)

    run()
    (taken,) = interleave({"product": run}, seconds=seconds).values()
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / min(taken)


class Task(NamedTuple):
    """A line of a table."""

    name: str
    competitor: Competitor
    start: Callable  # start(competitor, device, batch_size) gives the function to be timed
    peer: str | None = None  # the name of a line above that it is compared to
    work: float = 1.0  # done in each call, for each image of a batch: 20 steps are 20, 3 of 18 evaluations are 3 / 18


class Table(NamedTuple):
    title: str
    tasks: list[Task]
    batch_size: int
    seconds: float  # as long as there is time, rounds go on


def measure(table, device, peaks, rounds):
    """A dictionary for each task of a table, which is compared to the first task and to its peer. peaks: operations per
    second that are to be had, by precision."""
    report(table.title)
    runs, rows = {}, []
    for task in table.tasks:

        def prepare(device=device, batch_size=table.batch_size, task=task):
            run = task.start(task.competitor, device, batch_size)
            run()  # not timed: everything starts up
            return run

        report(f"   {task.name}: starts")
        # what one more image takes is the same on every device; what a batch takes whatever its size is Muon's part
        one, two = (count_operations(functools.partial(prepare, torch.device("cpu"), n)) for n in (1, 2))
        operations = (two - one) / task.work
        runs[task.name], memory = track_memory(prepare, device)
        rows.append({"name": task.name, "memory_bytes": memory, "operations_per_image": operations})
    report("   all in turn")
    taken = interleave(runs, rounds, table.seconds)
    rates = {task.name: [table.batch_size * task.work / each for each in taken[task.name]] for task in table.tasks}
    for task, row in zip(table.tasks, rows, strict=True):
        rate = rates[task.name]
        row["images_per_second"] = summarize(rate)
        row["rounds"] = len(rate)
        row["times_first"] = compare(rate, rates[table.tasks[0].name])
        row["times_diffusers"] = compare(rate, rates[task.peer]) if task.peer else None  # in the same precision
        done = row["images_per_second"]["median"] * row["operations_per_image"]
        row["share_of_peak"] = done / peaks[task.competitor.precision]
    return rows


def report(text):
    print(text, file=sys.stderr, flush=True)


# %% Training and sampling, beside others
def training_tasks(network_class, preset, precisions, steps):
    """Diffusers as it comes first; attention by hand where there is attention, as the lecture has it, in float32."""
    start = functools.partial(start_training, steps=steps)
    for kind in ("diffusers", "by hand", "ours"):
        for precision in precisions:
            competitor = Competitor(kind, network_class, preset, precision)
            theirs = competitor._replace(kind="diffusers").name
            if kind != "by hand" or (network_class is CondUNet and precision is None):
                yield Task(competitor.name, competitor, start, None if kind == "diffusers" else theirs, steps)
    yield Task(f"{competitor.name}, Muon", competitor, functools.partial(start, muon=True), None, steps)


def sampling_task(competitor, evaluations, guidance, measured, method="dpm++", peer=None):
    """Only so many evaluations of the network are measured. Of two, one is above GUIDED_BELOW and one below, as half of
    18 are."""
    start = functools.partial(start_sampling, evaluations=measured, guidance=guidance, method=method)
    name = f"{competitor.name}, {competitor.preset}, {evaluations}" + (", guided" if guidance else "")
    return Task(name, competitor, start, peer, measured / evaluations)


def sampling_tasks(precisions, measured):
    """The lecture's way first."""
    tasks = [sampling_task(Competitor("by hand", CondUNet, "lecture"), 100, 0, measured, "ddim")]
    for preset in ("lecture", "small"):
        ours = [Competitor("ours", CondUNet, preset, precision) for precision in precisions]
        for competitor in ours:
            theirs = sampling_task(competitor._replace(kind="diffusers"), 18, lesson4.GUIDANCE, measured)
            tasks += [theirs, sampling_task(competitor, 18, lesson4.GUIDANCE, measured, peer=theirs.name)]
        tasks.append(sampling_task(ours[-1], 18, 0, measured))
    return tasks


def make_tables(device, precisions, batch_size):
    cuda = device.type == "cuda"
    steps, measured, drawn, seconds = (20, 18, 200, 5) if cuda else (1, 2, 16, 0)
    for network_class, preset, attention in (
        (TimeUNet, "lecture", "without attention"),
        (CondUNet, "lecture", "with attention on the three lower levels"),
        (CondUNet, "small", "with its attention"),
    ):
        tasks = list(training_tasks(network_class, preset, precisions, steps))
        title = f"Training, batch {batch_size}: preset {preset}, {attention}"
        yield Table(title, tasks, batch_size, seconds or 10 * (preset == "small"))
    title = f"Sampling, {drawn} images: evaluations of the network for each ({measured} of them measured)"
    yield Table(title, sampling_tasks(precisions, measured), drawn, seconds)


def measure_speed(device, peaks, batch_size, rounds):
    """Yields the tables, each with its title."""
    for table in make_tables(device, list(peaks), batch_size):
        yield table.title, measure(table, device, peaks, rounds)


def print_speed(rows):
    print(f"{'':44}images/s{'times the first':>25}{'times diffusers, same':>25}   peak MB   GFLOP/image   of peak")
    for row in rows:
        memory = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:,.0f}"
        print(f"   {row['name']:41}{row['images_per_second']['median']:8.2f}", end="")
        for ratio in (row["times_first"], row["times_diffusers"]):
            print(f"{'{median:.2f} ({min:.2f} to {max:.2f})'.format(**ratio) if ratio else '':>25}", end="")
        print(f"{memory:>10}{row['operations_per_image'] / 1e9:14.2f}{row['share_of_peak']:10.0%}")


# %% How cost grows
def growth_nets():
    """Names, presets and sizes of images: larger images, then wider nets, then attention on more levels."""
    small, lecture = PRESETS["small"], PRESETS["lecture"]
    sixteen = small._replace(head_dim=16)  # channels of a head, which divide any width here
    yield from ((f"small, {size} × {size}", small, size) for size in (28, 32, 64, 128))
    yield from ((f"lecture, {size} × {size}", lecture, size) for size in (32, 64, 128))
    for widths in ((24, 48), (96, 192), (48, 96, 192)):
        yield f"small, widths {'/'.join(map(str, widths))}", sixteen._replace(widths=widths), 28
    for size in (28, 64):
        for levels in ((), (0, 1)):
            where = "in the middle only" if not levels else "on all levels"
            yield f"small, {size} × {size}, attention {where}", sixteen._replace(attention_levels=levels), size


def measure_cost(name, preset, size, device, precision, budget=2e10):
    """Parameters; multiply-adds and bytes kept for the backward pass of an image; images/s in training, in batches of
    about `budget` multiply-adds."""
    report(f"   {name}")
    PRESETS[name] = preset  # lesson 3 makes its networks from there
    competitor, cpu = Competitor("ours", CondUNet, name, precision, size), torch.device("cpu")
    denoiser = competitor._replace(precision=None).make_denoiser(cpu)
    told = {"sigma": torch.ones(1), "label": torch.zeros(1, dtype=torch.int64)}
    denoiser.forward = functools.partial(denoiser.forward, **told)
    x = lesson3.draw_noise(competitor.run, cpu, [(0, 0, 0)])
    operations = count_operations(functools.partial(denoiser, x)) // 2
    batch_size = min(64, max(1, round(budget / operations)))
    run = start_training(competitor, device, batch_size)
    run()
    (taken,) = interleave({name: run}).values()
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "multiply_adds": operations,
        "kept_bytes": lesson2.measure_kept(denoiser, x),
        "images_per_second": batch_size / statistics.median(taken),
        "batch_size": batch_size,
    }


def measure_growth(device, precision):
    """Yields one table, with its title."""
    title = f"How cost grows: lesson 4's network, images/s of training in {name_precision(precision)}"
    report(title)
    yield title, [measure_cost(*net, device, precision) for net in growth_nets()]


def print_growth(rows):
    print(f"{'':49}parameters   multiply-adds   kept for backward   images/s   in batches of")
    for row in rows:
        print(f"   {row['name']:46}{row['parameters']:10,}{row['multiply_adds'] / 1e6:14,.0f} M", end="")
        print(f"{row['kept_bytes'] / 1e6:17.1f} MB{row['images_per_second']:11.1f}{row['batch_size']:16}")


# %% As a command
def describe_machine(device, peaks):
    """One line; peaks: operations per second by precision, where they were measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = torch.cuda.get_device_name() if device.type == "cuda" else (models or [platform.processor()])[0]
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    tops = [f"{peak / 1e9:,.0f} GFLOP/s in {name_precision(precision)}" for precision, peak in peaks.items()]
    return ", ".join([f"{device.type}: {name}", f"{torch.get_num_threads()} threads", versions, *tops])


def main(arguments=None):
    count = lesson3.number(int, 1, "a whole number from 1 up")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--growth", action="store_true", help="what larger images, nets and attention cost, instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s)")
    parser.add_argument("--batch-size", type=count, default=64, help="of training (%(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="at least (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        device = lesson3.choose_device(options.device)
    except lesson3.UserError as error:
        parser.error(str(error))
    began, fast = time.perf_counter(), lesson3.choose_precision(device)
    precisions = [None, fast] if fast else [None]
    peaks = {} if options.growth else {precision: measure_machine(device, precision) for precision in precisions}
    machine = describe_machine(device, peaks)
    if options.growth:
        tables, print_table = measure_growth(device, fast), print_growth
    else:
        tables, print_table = measure_speed(device, peaks, options.batch_size, options.rounds), print_speed
    found = {"machine": machine, "GPU": None if torch.cuda.is_available() else "not measured", "tables": {}}
    for title, rows in tables:
        found["tables"][title] = rows
        if not options.json:
            print(f"\n{title}\n   {machine}")
            print_table(rows)
    if options.json:
        print(json.dumps(found))
    elif not torch.cuda.is_available():
        print("\nGPU: not measured, for want of one")
    report(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
