"""How fast is it, beside what else there is, and beside what the machine could do? Run by hand.

    python tests/measure_speed.py [--device D]            training and sampling, ours and others
    python tests/measure_speed.py --limited               training on a CPU as if it had AVX2 alone, the last table
    python tests/measure_speed.py --growth [--device D]   what larger images, nets and attention cost

Three networks of the same structure, driven by the same code (lesson 3's `train` and `sample`): ours, ours with
attention by hand (lesson 2's `attention`, the lecture's way), and diffusers' UNet2DModel, which comes in float32 with
its weights in contiguous order and chooses its attention itself. The images are noise; time doesn't care.

It takes about five minutes on two CPU cores, --growth less than three.
"""

import argparse
import copy
import functools
import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from export_diffusers import make_unet
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lesson_tools as tools

lesson2 = importlib.import_module("02_attention")
lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")
PRESETS = lesson3.PRESETS
TIMED, CONDITIONAL = lesson3.make_network, lesson4.make_network  # the first has no attention


# %% The competitors
class Diffusers(nn.Module):
    """A UNet2DModel with our network's interface, so that the same code trains it and samples from it."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.n_classes = (unet.config.num_class_embeds or 1) - 1

    def forward(self, x, time, label=None):
        """x: `(n, channels, h, w)`, time: `(n,)`, label: `(n,)`, left out if the model has no classes."""
        return self.unet(x, time, label if self.unet.config.num_class_embeds else None).sample


def name_precision(precision):
    return "bfloat16" if precision else "float32"


class Competitor(NamedTuple):
    """A network and how it computes."""

    kind: str  # "ours", "by hand" or "diffusers"
    make_network: Callable  # TIMED or CONDITIONAL
    preset: str
    precision: torch.dtype | None = None  # None is float32
    size: int = 28  # of the images, before they are padded as the preset needs it

    @property
    def name(self):
        return f"{self.kind}, {name_precision(self.precision)}"

    def make_denoiser(self, device):
        preset, classes = PRESETS[self.preset], tuple("0123456789")
        network = self.make_network(preset, len(classes))
        asked = type(network).__name__, self.preset, 1, 64, 0
        settings = lesson3.RunSettings(*asked, "noise", 256, classes, (self.size, self.size), 0.7)
        if self.kind == "diffusers":
            unet = Diffusers(make_unet(settings))
            return lesson3.Denoiser(unet, settings.sigma_data, preset.patch, self.precision).to(device)
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


def synchronize(device):
    """Wait until the device has done all it was given; before that, the clock tells nothing."""
    getattr(torch, device.type).synchronize()


def start_training(competitor, device, batch_size, muon=False):
    """A function that trains for a step, which is lesson 3's: noise, loss, backward, clipping, optimiser, moving
    average. The optimiser is AdamW, or lesson 3's pair with Muon."""
    denoiser = competitor.make_denoiser(device)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    optimizers = (lesson3.use_muon if muon else lesson3.use_adamw)(denoiser.parameters(), 0.0)
    batches = lesson3.draw_batches(*competitor.make_images(256, device), batch_size, 0, range(10**6))
    if competitor.make_network is CONDITIONAL:
        batches = lesson4.drop_labels(batches, 10)
    return functools.partial(next, lesson3.train(denoiser, ema, optimizers, batches, 10**6))


def start_sampling(competitor, device, batch_size, steps, guidance, method="dpm++"):
    """A function that draws a batch in so many steps, as lesson 4 does. A step of these methods is one evaluation of
    the network; if guidance acts, of twice as many images."""
    denoiser = competitor.make_denoiser(device).eval().requires_grad_(False)
    images, label = competitor.make_images(batch_size, device)
    noise = torch.randn(images.shape, device=device)

    def run():
        denoise = lesson4.guide(denoiser, label, guidance)
        for _ in lesson3.sample(denoise, noise, lesson3.noise_levels(steps), method):
            pass

    return run


# %% What is measured
# The counter knows the fused attention of GPUs; that of CPUs, which does the same, it takes for free. A formula
# is given the shapes of an operation's arguments.
aten = torch.ops.aten
FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, **_: sdpa_flop_count(*args[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *args, **_: sdpa_backward_flop_count(*args[:4]),
}


def count_operations(run):
    """Floating-point operations of convolutions, matrix products and attention; a multiply-add is two of them. Fused
    attention computes its scores a second time for the backward pass, so it has more of them than attention by hand."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        run()
    return counter.get_total_flops()


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


def compare(rates, others):
    """How many times as fast, round by round: rates and others are images/s in the same rounds. The median, and the
    smallest and the largest."""
    ratios = [rate / other for rate, other in zip(rates, others, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def optimizer_share(run, device, clock=time.perf_counter):
    """What share of the seconds of run(), which trains, is spent in the steps of optimisers."""
    stamps = []

    def stamp(*_):
        synchronize(device)
        stamps.append(clock())

    hooks = register_optimizer_step_pre_hook(stamp), register_optimizer_step_post_hook(stamp)
    stamp()
    run()
    stamp()
    for hook in hooks:
        hook.remove()
    began, *steps, ended = stamps
    return (sum(steps[1::2]) - sum(steps[::2])) / (ended - began)


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
    start: Callable  # start(competitor, device, batch_size) gives a function that works on a batch
    peer: str | None = None  # the name of a line above that it is compared to, of the same precision
    calls: int = 1  # of that function in a round, before it waits for the device
    work: float = 1.0  # done in each call, for each image: of training, a step; of sampling, perhaps 2 / 14


def prepare(task, device, batch_size, calls=1):
    """The function to be timed, called once: everything starts up."""
    once = task.start(task.competitor, device, batch_size)

    def run():
        for _ in range(calls):
            once()
        synchronize(device)

    run()
    return run


def measure(tasks, device, batch_size, peaks, rounds, seconds):
    """A dictionary for each task, which is compared to the first one and to its peer. peaks: operations per second that
    are to be had, by precision. rounds, seconds: as long as there is time, rounds go on."""
    runs, rows = {}, []
    for task in tasks:
        report(f"   {task.name}: starts")
        # what one more image takes is the same on every device; what a batch takes whatever its size is Muon's part
        one, two = (count_operations(functools.partial(prepare, task, torch.device("cpu"), n)) for n in (1, 2))
        runs[task.name] = prepare(task, device, batch_size, task.calls)
        rows.append({"name": task.name, "operations": (two - one) / task.work})
    report("   all in turn")
    taken = interleave(runs, rounds, seconds)
    rates = {task.name: [batch_size * task.calls * task.work / each for each in taken[task.name]] for task in tasks}
    for task, row in zip(tasks, rows, strict=True):
        rate = rates[task.name]
        row["rate"] = statistics.median(rate)
        row["times_first"] = compare(rate, rates[tasks[0].name])
        row["times_peer"] = compare(rate, rates[task.peer]) if task.peer else None
        row["of_peak"] = row["rate"] * row["operations"] / peaks[task.competitor.precision]
        row["optimizer"] = optimizer_share(runs[task.name], device)
    return rows


def report(text):
    print(text, file=sys.stderr, flush=True)


def print_rows(rows):
    print(f"{'':44}images/s{'times the first':>25}{'times diffusers, same':>25}   GFLOP/image   of peak   optimiser")
    for row in rows:
        print(f"   {row['name']:41}{row['rate']:8.2f}", end="")
        for ratio in (row["times_first"], row["times_peer"]):
            print(f"{'{:.2f} ({:.2f} to {:.2f})'.format(*ratio) if ratio else '':>25}", end="")
        print(f"{row['operations'] / 1e9:14.2f}{row['of_peak']:10.0%}{row['optimizer']:12.1%}")


# %% Training and sampling, beside others
def training_tasks(make_network, preset, precisions, steps):
    """Diffusers as it comes first; attention by hand if there is attention, as the lecture has it, in float32."""
    for kind in ("diffusers", "by hand", "ours"):
        for precision in precisions:
            competitor = Competitor(kind, make_network, preset, precision)
            theirs = competitor._replace(kind="diffusers").name
            if kind != "by hand" or (make_network is CONDITIONAL and precision is None):
                yield Task(competitor.name, competitor, start_training, None if kind == "diffusers" else theirs, steps)
    yield Task(f"{competitor.name}, Muon", competitor, functools.partial(start_training, muon=True), None, steps)


def sampling_task(competitor, steps, guidance, measured, method="dpm++", peer=None):
    """Only so many steps are measured. Of two, one is above GUIDED_BELOW and one below, as half of lesson 3's are."""
    start = functools.partial(start_sampling, steps=measured, guidance=guidance, method=method)
    name = f"{competitor.name}, {competitor.preset}, {steps}" + (", guided" if guidance else "")
    return Task(name, competitor, start, peer, work=measured / steps)


def sampling_tasks(precisions, measured):
    """The lecture's way first."""
    tasks = [sampling_task(Competitor("by hand", CONDITIONAL, "lecture"), 100, 0, measured, "ddim")]
    for preset in ("lecture", "small"):
        for precision in precisions:
            ours = Competitor("ours", CONDITIONAL, preset, precision)
            theirs = sampling_task(ours._replace(kind="diffusers"), lesson3.STEPS, lesson4.GUIDANCE, measured)
            tasks += [theirs, sampling_task(ours, lesson3.STEPS, lesson4.GUIDANCE, measured, peer=theirs.name)]
        tasks.append(sampling_task(ours, lesson3.STEPS, 0, measured))
    return tasks


# By these oneDNN, PyTorch and MKL leave out what a processor can do beyond AVX2. They count from a process's start on.
LIMITS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def measure_speed(device, peaks, batch_size, rounds, limited):
    """Print the tables, each when it is measured. limited: preset small in training alone."""
    cuda = device.type == "cuda"
    steps, measured, drawn, seconds = (20, lesson3.STEPS, 200, 5) if cuda else (1, 2, 16, 0)

    def show(title, tasks, n, enough):
        report(title)
        rows = measure(list(tasks), device, n, peaks, rounds, enough)
        print(f"\n{title}")
        print_rows(rows)

    title = f"Training, batches of {batch_size}, and the share of a step that the optimisers take"
    lecture, small = f"{title}: preset lecture", f"{title}: preset small"
    if limited:
        show(f"{small}, AVX2", training_tasks(CONDITIONAL, "small", peaks, steps), batch_size, seconds or 10)
        return
    show(f"{lecture}, without attention", training_tasks(TIMED, "lecture", peaks, steps), batch_size, seconds)
    show(f"{lecture}, with attention", training_tasks(CONDITIONAL, "lecture", peaks, steps), batch_size, seconds)
    show(small, training_tasks(CONDITIONAL, "small", peaks, steps), batch_size, seconds or 10)
    title = f"Sampling, {drawn} images: steps for each ({measured} of them measured)"
    show(title, sampling_tasks(peaks, measured), drawn, seconds)
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):  # others know nothing of AVX2
        command = [__file__, "--limited", f"--batch-size={batch_size}", f"--rounds={rounds}"]
        print(flush=True)
        subprocess.run([sys.executable, *command], check=True)


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
    PRESETS[name] = preset  # lesson 3 makes its networks from there
    competitor, cpu = Competitor("ours", CONDITIONAL, name, precision, size), torch.device("cpu")
    denoiser = competitor._replace(precision=None).make_denoiser(cpu)
    images, label = competitor.make_images(1, cpu)
    one = images.float(), torch.ones(1), label
    operations = count_operations(lambda: denoiser(*one)) // 2
    batch_size = min(64, max(1, round(budget / operations)))
    run = prepare(Task(name, competitor, start_training), device, batch_size)
    (taken,) = interleave({name: run}).values()
    parameters, kept = sum(p.numel() for p in denoiser.parameters()), lesson2.saved_bytes(denoiser, *one)
    return parameters, operations, kept, batch_size / statistics.median(taken), batch_size


def measure_growth(device, precision):
    print(f"How cost grows: lesson 4's network, images/s of training in {name_precision(precision)}")
    print(f"{'':49}parameters   multiply-adds   kept for backward   images/s   in batches of")
    for name, preset, size in growth_nets():
        parameters, operations, kept, rate, batch_size = measure_cost(name, preset, size, device, precision)
        print(f"   {name:46}{parameters:10,}{operations / 1e6:14,.0f} M{kept / 1e6:17.1f} MB", end="")
        print(f"{rate:11.1f}{batch_size:16}", flush=True)


# %% As a command
def describe_machine(device, peaks):
    """One line; peaks: operations per second by precision, if they were measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = torch.cuda.get_device_name() if device.type == "cuda" else (models or [platform.processor()])[0]
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    tops = [f"{peak / 1e9:,.0f} GFLOP/s in {name_precision(precision)}" for precision, peak in peaks.items()]
    return ", ".join([f"{device.type}: {name}", f"{torch.get_num_threads()} threads", versions, *tops])


def main(arguments=None):
    count = tools.number(int, 1, 10**6)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--growth", action="store_true", help="what larger images, nets and attention cost, instead")
    parser.add_argument("--limited", action="store_true", help="preset small on a CPU as if it had AVX2 alone, instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s)")
    parser.add_argument("--batch-size", type=count, default=64, help="of training (%(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="at least (%(default)s)")
    options = parser.parse_args(arguments)
    if options.limited and not LIMITS.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | LIMITS)  # begins again, with the limits
    device = tools.choose_device("cpu" if options.limited else options.device)
    began, fast = time.perf_counter(), None if options.limited else tools.choose_precision(device)
    if options.growth:
        print(describe_machine(device, {}))
        measure_growth(device, fast)
    else:
        peaks = {precision: measure_machine(device, precision) for precision in dict.fromkeys((None, fast))}
        print(describe_machine(device, peaks))
        measure_speed(device, peaks, options.batch_size, options.rounds, options.limited)
    if not options.limited and not torch.cuda.is_available():
        print("\nGPU: not measured, for want of one")
    report(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    tools.run_command(main)
