"""How good are the samples of lessons 3 and 4? Measured with two classifiers that judge them, run by hand.

    python tests/measure_quality.py CHECKPOINT [--n N] [--steps S] [--guidance W]
    python tests/measure_quality.py CHECKPOINT --sweep      the distance against steps, and against guidance
    python tests/measure_quality.py --ladder [--epochs E]   what each idea of the lecture buys: trains four networks

The first prints, for the samples, for as many training images (the floor: nobody draws better garments) and for white
noise: the Fréchet distance (Heusel et al. 2017) and the kernel distance (Bińkowski et al. 2018) to the test images, in
the features of each judge; how many are taken for the class asked for; and how near they come to the training images,
which tells whether the network draws or copies.
"""

import argparse
import copy
import functools
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from distances import frechet_distance, kernel_distance
from judge import ARCHITECTURES, get_judge, look, to_range
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lesson_tools as tools

lesson2 = importlib.import_module("02_attention")
lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")

SWEPT_STEPS = (4, 6, 9, 12, 18, 36)
SWEPT_GUIDANCE = (0, 0.5, 1, 1.5, 2, 3)


# %% The samples
class UnlabelledUNet(lesson4.CondUNet):
    """Lesson 4's network without labels: it shows what attention alone is worth."""

    def embed(self, time, label):
        return super().embed(time, None)


NETWORKS = {  # make_network and change_batches, for lesson 3
    "UntimedUNet": (functools.partial(lesson3.make_network, network_class=lesson3.UntimedUNet), None),
    "TimeUNet": (lesson3.make_network, None),
    "UnlabelledUNet": (functools.partial(lesson4.make_network, network_class=UnlabelledUNet), None),
    "CondUNet": (lesson4.make_network, lesson4.drop_labels),
}


def load_denoiser(path, device):
    """The averaged denoiser in a checkpoint of lesson 3, lesson 4 or the ladder, and its `RunSettings`. Raises
    UserError."""
    checkpoint = tools.load_checkpoint(path, lesson3.RunSettings)
    if checkpoint is None or checkpoint["settings"].network not in NETWORKS:
        raise tools.UserError(f"{path}: no checkpoint of these lessons there")
    make_network, _ = NETWORKS[checkpoint["settings"].network]
    return lesson3.load_denoiser(path, make_network, device)


def draw_samples(denoiser, settings, n, steps=lesson3.STEPS, guidance=None):
    """n images, float32 (n, 1, height, width) in [-1, 1], and the labels (n,) asked for: the classes in turn.

    guidance: None if no label is given; then the second result is None, too.
    """
    n_classes = 1 if guidance is None else len(settings.classes)
    noise_ids = [(0, i % n_classes, i // n_classes) for i in range(n)]

    def make_denoise(label):
        return denoiser if guidance is None else lesson4.guide(denoiser, label, guidance)

    images, _ = lesson3.sample_images(make_denoise, noise_ids, settings, steps, denoiser.device)
    return images, None if guidance is None else torch.arange(n) % n_classes


class Baselines:
    """What samples are measured beside: as many training images (better than that can't be expected), equally many of
    each class, and white noise."""

    def __init__(self, train, n):
        order = np.random.default_rng(0).permutation(len(train.labels))
        of_class = [order[train.labels[order] == label] for label in range(len(train.classes))]
        self.numbers = torch.from_numpy(np.stack(of_class, axis=1).ravel()[:n])  # classes in turn; all equally large
        self.images = to_range(torch.from_numpy(train.images)[self.numbers])
        self.labels = torch.from_numpy(train.labels)[self.numbers]
        self.noise = torch.randn(self.images.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)

    def judge(self, panel):
        """Yield the name of each, and the panel's verdicts on it."""
        yield "training images", panel.judge(self.images, self.labels)
        yield "white noise", panel.judge(self.noise, self.labels)


# %% What the judges say
class Verdict(NamedTuple):
    """What a judge says of a set of images."""

    distances: list[float]  # Fréchet distance and 1000 × kernel distance; Fréchet distance of standardised features
    right: float | None  # the share that is taken for the class asked for, if one was


def print_table(head, rows):
    """What both judges say, line by line as it is measured; rows: (beginning, verdicts) of each."""
    print("\nFréchet distance, kernel distance × 1000, Fréchet distance of standardised features, right classes")
    print(" " * len(head) + "".join(f"{f'judge {name!r}':>42}" for name in ARCHITECTURES))
    print(head + f"{'Fréchet':>12}{'kernel':>10}{'standard':>10}{'right':>10}" * len(ARCHITECTURES))
    for beginning, verdicts in rows:
        print(f"{beginning:{len(head)}}", end="")
        for distances, right in verdicts.values():
            share = "-" if right is None else f"{right:.1%}"
            print("{:12.3f}{:10.3f}{:10.3f}{:>10}".format(*distances, share), end="")
        print(flush=True)


def measure_distances(features, expected):
    """As in `Verdict`, between features (n, d) and those of the test images (m, d).

    Standardised, a feature that hardly varies counts as much as any other. One that is (nearly) constant on the test
    images says nothing there, and is left out.
    """
    mean, deviation = expected.mean(axis=0), expected.std(axis=0)
    alive = deviation > 1e-3 * deviation.max()
    standardised = [((x - mean) / np.where(alive, deviation, 1))[:, alive] for x in (features, expected)]
    kernel = 1000 * kernel_distance(features, expected)
    return [frechet_distance(features, expected), kernel, frechet_distance(*standardised)]


class Panel:
    """The two judges, and what they see in the test images."""

    def __init__(self, train, test, device):
        images, labels = (torch.from_numpy(array).to(device) for array in (train.images, train.labels))
        self.judges = {name: get_judge(name, images, labels) for name in ARCHITECTURES}
        test_images = to_range(torch.from_numpy(test.images))
        self.seen = {name: look(judge, test_images) for name, judge in self.judges.items()}
        for name, (_, taken_for) in self.seen.items():
            right = (taken_for == torch.from_numpy(test.labels)).float().mean()
            print(f"judge     {name!r} names {right:.1%} of the test images correctly")

    def judge(self, images, asked=None):
        """The `Verdict` of each judge on float32 images (n, 1, 28, 28) in [-1, 1], and labels (n,) asked for."""
        verdicts = {}
        for name, judge in self.judges.items():
            features, taken_for = look(judge, images)
            pair = (x.double().numpy() for x in (features, self.seen[name][0]))
            right = None if asked is None else float((taken_for == asked).float().mean())
            verdicts[name] = Verdict(measure_distances(*pair), right)
        return verdicts


# %% Does it copy?
def find_nearest(images, others, but=None, batch_size=250):
    """For each image (n, 1, h, w) the nearest of the others (m, 1, h, w): its number (n,), and its distance (n,), the
    root of the mean squared difference of a pixel. but: the number (n,) of an image that doesn't count, for each."""
    a, b = images.flatten(1), others.flatten(1)
    half_squares = b.square().sum(dim=1) / 2
    found = []
    for chosen in tqdm(torch.arange(len(a)).split(batch_size), desc="nearest images", leave=False, disable=None):
        closeness = a[chosen] @ b.T - half_squares  # |a - b|² = |a|² - 2 closeness
        if but is not None:
            closeness[torch.arange(len(chosen)), but[chosen]] = -torch.inf
        found.append(closeness.argmax(dim=1))
    found = torch.cat(found)
    return found, (a - b[found]).square().mean(dim=1).sqrt()


def measure_copies(images, baselines, train, test, device):
    """Print how near samples come to training images, beside how near test images do."""
    training_images, test_images = (to_range(torch.from_numpy(part.images)) for part in (train, test))
    sets = {"samples": images, "test images": test_images}
    sets |= {"training images": baselines.images, "white noise": baselines.noise}
    print("\ndistance to the nearest training image (of a training image: to the nearest other one; of a copy: 0)")
    print(f"{'':26}{'median':>10}{'10 %':>10}{'1 %':>10}{'smallest':>10}")
    for name, x in sets.items():
        but = baselines.numbers if name == "training images" else None
        _, distances = find_nearest(x.to(device), training_images.to(device), but)
        print(f"{name:26}" + "".join(f"{distances.quantile(q):10.3f}" for q in (0.5, 0.1, 0.01, 0)))


# %% The measurement of one checkpoint
def measure(options, denoiser, settings, train, test, panel):
    """All figures of one checkpoint, with the steps and guidance of the command line."""
    images, labels = draw_samples(denoiser, settings, options.n, options.steps, options.guidance)
    baselines = Baselines(train, options.n)
    print_table(" " * 26, [("samples", panel.judge(images, labels)), *baselines.judge(panel)])
    measure_copies(images, baselines, train, test, denoiser.device)


# %% The sweep
def sweep(options, denoiser, settings, train, panel):
    """Distances against steps, and against guidance if there is a label; the other is the command line's."""
    pairs = [(steps, options.guidance) for steps in sorted({*SWEPT_STEPS, options.steps})]
    if options.guidance is not None:
        pairs += [(options.steps, guidance) for guidance in sorted({*SWEPT_GUIDANCE, options.guidance})]

    def measure_pairs():
        for steps, guidance in dict.fromkeys(pairs):
            shown = "-" if guidance is None else f"{guidance:g}"
            yield f"{steps:5}{shown:>10}", panel.judge(*draw_samples(denoiser, settings, options.n, steps, guidance))
        yield "training images", panel.judge(Baselines(train, options.n).images)

    print_table("steps  guidance", measure_pairs())


# %% The ladder
def climb(options, train, panel):
    """Train the four networks, on the same images, and sample each; the last one with guidance, too.

    The same budget is the same number of images, in the same batches with the same noise: so it doesn't depend on how
    fast the machine is. What a network takes longer for them stands in the table.
    """
    networks = {}
    for name, (make_network, change) in NETWORKS.items():
        print()
        path = options.out / name / "checkpoint.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        networks[name], settings = lesson3.train_or_load(options, path, make_network, lesson3.make_denoise, change)
    rungs = {
        "without time": ("UntimedUNet", None),
        "with time": ("TimeUNet", None),
        "with attention": ("UnlabelledUNet", None),
        "with the label": ("CondUNet", 0.0),
        f"with guidance {options.guidance:g}": ("CondUNet", options.guidance),
    }
    milliseconds, shown, found = measure_milliseconds(networks, settings), [], {}

    def measure_rungs():
        for rung, (name, guidance) in rungs.items():
            images, labels = draw_samples(networks[name], settings, options.n, options.steps, guidance)
            shown.append(images[:10])
            found[rung] = panel.judge(images, labels)
            parameters = sum(parameter.numel() for parameter in networks[name].parameters())
            yield f"{rung:18}{parameters:12,}{milliseconds[name]:8.2f}", found[rung]
        yield from Baselines(train, options.n).judge(panel)

    title = f"{settings.data}, preset {settings.preset}, {settings.steps:,} training steps each; {options.n:,} samples"
    print(f"\n{title}\nms: training on one image, without the optimiser")
    print_table(f"{'':18}{'parameters':>12}{'ms':>8}", measure_rungs())
    save_ladder(options.out / "ladder.png", title, shown, found)


def measure_milliseconds(denoisers, settings):
    """What a forward and backward pass takes for one image of a batch; denoisers: a dictionary. Returns another."""
    x = lesson3.pad(torch.randn(settings.batch_size, 1, *settings.size), lesson3.PRESETS[settings.preset])
    trained = [copy.deepcopy(denoiser).requires_grad_() for denoiser in denoisers.values()]
    layers = [functools.partial(denoiser, sigma=1.0) for denoiser in trained]
    seconds = lesson2.measure_seconds(layers, x.to(trained[0].device), enough=5)
    return {name: 1000 * value / len(x) for name, value in zip(denoisers, seconds, strict=True)}


def save_ladder(path, title, shown, found):
    """A row of samples for each rung, and its distances beside them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(2, 1))
    tools.plot_images(left, torch.cat(shown), 10, found)
    for place, judge in enumerate(ARCHITECTURES):
        values = [verdicts[judge].distances[0] for verdicts in found.values()]
        y = np.arange(len(values)) + 0.36 * (place - 0.5)
        bars = right.barh(y, values, height=0.32, color=("black", "0.7")[place], label=f"judge {judge!r}")
        right.bar_label(bars, fmt="%.2f", padding=3)
    right.set(yticks=[], xlabel="Fréchet distance to the test images", ylim=(len(found) - 0.5, -0.5))
    right.margins(x=0.15)
    right.legend()
    figure.suptitle(title)
    tools.save_picture(figure, path)


# %% The command
def work(options):
    """Do what the command line asks for. Raises UserError, DataError or OSError."""
    if options.ladder == bool(options.checkpoint):
        raise tools.UserError("either a CHECKPOINT, or --ladder, which trains its own")
    options.n = options.n or (2_000 if options.sweep else 10_000)
    device = tools.choose_device(options.device)
    train, test = (tools.load_data(options.data, split, options.data_dir) for split in data.SPLITS)
    sources, seen = {(split.classes, split.name) for split in (train, test)}, options.epochs * len(train.labels)
    if options.checkpoint:
        denoiser, settings = load_denoiser(options.checkpoint, device)
        sources, seen = sources | {(settings.classes, settings.data)}, settings.images_seen
        if options.guidance is not None and settings.network != "CondUNet":
            raise tools.UserError(f"--guidance: {settings.network} in {options.checkpoint} has no label to follow")
    if sources != {(data.fashion_mnist.CLASSES, "Fashion-MNIST")}:
        raise tools.UserError("the judges know Fashion-MNIST's own files alone; CHECKPOINT or --data-dir has others")
    if options.guidance is None and (options.ladder or settings.network == "CondUNet"):
        options.guidance = lesson4.choose_guidance(seen)
    panel = Panel(train, test, device)
    guidance = "" if options.guidance is None else f", guidance {options.guidance:g}"
    print(f"samples   {options.n:,} in {options.steps} steps{guidance}")
    if options.ladder:
        climb(options, train, panel)
    elif options.sweep:
        sweep(options, denoiser, settings, train, panel)
    else:
        measure(options, denoiser, settings, train, test, panel)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, number = parser.add_argument, tools.number
    add("checkpoint", metavar="CHECKPOINT", nargs="?", type=Path, help="checkpoint.pt of a run of 03 or 04")
    add("--sweep", action="store_true", help="the distance against steps, and against guidance")
    add("--ladder", action="store_true", help="train and measure the networks of lessons 3 and 4, instead")
    add("--n", metavar="N", type=number(int, 20, 60_000), help="samples (10,000; in a sweep 2,000)")
    add("--steps", metavar="S", type=number(int, 1, 10**6), default=lesson3.STEPS, help="(%(default)s)")
    add("--guidance", metavar="W", type=number(float, 0, 100), help="if there is a label (as in 04)")
    add("--data-dir", metavar="DIR", help="folder with the four Fashion-MNIST files, also $FASHION_MNIST_DIR")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s: the fastest there is)")
    add("--epochs", metavar="E", type=number(float, 1e-9, 1e5), default=2, help="of the ladder (%(default)s)")
    add("--preset", choices=lesson3.PRESETS, default="small", help="of the ladder (%(default)s)")
    add("--restart", action="store_true", help="train the ladder anew, whatever checkpoints are there")
    add("--out", metavar="DIR", type=Path, default=tools.RUNS / "ladder", help="of the ladder (%(default)s)")
    parser.set_defaults(data="fashion-mnist", batch_size=None, seed=0, sample_only=False)  # for lesson 3
    work(parser.parse_args())


if __name__ == "__main__":
    tools.run_command(main)
