"""How good are the samples of lessons 3 and 4? Measured with two classifiers that judge them, run by hand.

    python tests/measure_quality.py CHECKPOINT [--n N] [--method M] [--steps S] [--guidance W]
    python tests/measure_quality.py CHECKPOINT --sweep      the distance against steps, and against guidance
    python tests/measure_quality.py --ladder [--epochs E]   what each idea of the lecture buys: trains four networks

The first prints, for the samples, for as many training images (the floor: nobody draws better garments) and for white
noise: the Fréchet distance (Heusel et al. 2017) and the kernel distance (Bińkowski et al. 2018) to the test images, in
the features of each judge; how many are taken for the class asked for; and how near they come to the training images,
which tells whether the network draws or copies. Pictures go to quality/ beside the checkpoint.
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
from judge import ARCHITECTURES, get_judge, look, to_range
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
lesson1 = importlib.import_module("01_time_embedding")
lesson2 = importlib.import_module("02_attention")
lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")
data = importlib.import_module("data")
reference = importlib.import_module("reference_numpy")
UserError = lesson3.UserError

SAMPLES = {"measure": 10_000, "sweep": 2_000, "ladder": 5_000}
LADDER_EPOCHS = 2
SWEPT_STEPS = (4, 6, 9, 12, 18, 36)
SWEPT_GUIDANCE = (0, 0.5, 1, 1.5, 2, 3)


# %% The samples
# What attention alone is worth says lesson 4's network if it is never told a label.
class UnlabelledUNet(lesson4.CondUNet):
    pass


NO_LABEL = lesson4.MODEL._replace(network=UnlabelledUNet, told=lambda label, n: (torch.full_like(label, n),))
UNTIMED, TIMED = lesson3.Model(lesson3.UntimedUNet), lesson3.Model(lesson3.TimeUNet)
MODELS = {model.network.__name__: model for model in (UNTIMED, TIMED, NO_LABEL, lesson4.MODEL)}


def load_denoiser(path, device):
    """The averaged denoiser in a checkpoint of lesson 3, lesson 4 or the ladder, and its `Run`. Raises UserError."""
    checkpoint = lesson3.load_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path}: no checkpoint there")
    model = MODELS.get(checkpoint["run"].network)
    if model is None:
        raise UserError(f"{path}: not a network of these lessons, or of another version of them")
    return lesson3.load_trained(path, model, device)


def count_evaluations(method, steps):
    """How often a sample asks the network: once a step; Heun's method twice, but for the last step. (Guidance asks for
    two predictions at once wherever it acts, which is twice the work in half of the steps.)"""
    return 2 * steps - 1 if method == "heun" else steps


def draw_samples(denoiser, run, n, steps=lesson3.STEPS, guidance=None, method="dpm++"):
    """n images, float32 (n, 1, height, width) in [-1, 1], and the labels (n,) asked for: the classes in turn.

    guidance: None if no label is given; then the second result is None, too.
    """
    n_classes = 1 if guidance is None else len(run.classes)
    starts = [(0, i % n_classes, i // n_classes) for i in range(n)]
    sampler = functools.partial(lesson3.sample, sigmas=lesson3.noise_levels(steps), method=method)

    def make_denoise(label):
        return denoiser if guidance is None else lesson4.guide(denoiser, label, guidance)

    images, _ = lesson3.sample_images(run, starts, make_denoise, sampler, denoiser.device)
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
    taken_for: torch.Tensor  # the class of each image, (n,)
    right: float | None  # the share that is taken for the class asked for, if one was


def print_table(head, rows):
    """What both judges say, line by line as it is measured; rows: (beginning, verdicts) of each."""
    print(
        "\nFréchet distance, kernel distance × 1000, Fréchet distance of standardised features, share of right classes"
    )
    print(" " * len(head) + "".join(f"{f'judge {name!r}':>42}" for name in ARCHITECTURES))
    print(head + f"{'Fréchet':>12}{'kernel':>10}{'standard':>10}{'right':>10}" * len(ARCHITECTURES))
    for beginning, verdicts in rows:
        print(f"{beginning:{len(head)}}", end="")
        for distances, _, right in verdicts.values():
            print(
                "{:12.3f}{:10.3f}{:10.3f}".format(*distances) + f"{'-' if right is None else f'{right:.1%}':>10}",
                end="",
            )
        print(flush=True)


def measure_distances(features, expected):
    """As in `Verdict`, between features (n, d) and those of the test images (m, d).

    Standardised, a feature that hardly varies counts as much as any other. One that is (nearly) constant on the test
    images says nothing there, and is left out.
    """
    mean, deviation = expected.mean(axis=0), expected.std(axis=0)
    alive = deviation > 1e-3 * deviation.max()
    standardised = [((x - mean) / np.where(alive, deviation, 1))[:, alive] for x in (features, expected)]
    kernel = 1000 * reference.kernel_distance(features, expected)
    return [reference.frechet_distance(features, expected), kernel, reference.frechet_distance(*standardised)]


class Panel:
    """The two judges, and what they see in the test images."""

    def __init__(self, train, test, device):
        images, labels = (torch.from_numpy(array).to(device) for array in train[:2])
        self.judges = {name: get_judge(name, images, labels) for name in ARCHITECTURES}
        test_images = to_range(torch.from_numpy(test.images))
        self.seen = {name: look(judge, test_images) for name, judge in self.judges.items()}
        self.labels = torch.from_numpy(test.labels)
        for name, (_, taken_for) in self.seen.items():
            right = (taken_for == self.labels).float().mean()
            print(f"judge     {name!r} names {right:.1%} of the test images correctly")

    def judge(self, images, asked=None):
        """The `Verdict` of each judge on float32 images (n, 1, 28, 28) in [-1, 1], and labels (n,) asked for."""
        verdicts = {}
        for name, judge in self.judges.items():
            features, taken_for = look(judge, images)
            pair = (x.double().numpy() for x in (features, self.seen[name][0]))
            right = None if asked is None else float((taken_for == asked).float().mean())
            verdicts[name] = Verdict(measure_distances(*pair), taken_for, right)
        return verdicts


def count_confusions(asked, taken_for, n_classes):
    """How often (classes, classes) an image of a class, the row, is taken for another, as a share of the row."""
    counts = torch.bincount(asked * n_classes + taken_for, minlength=n_classes**2).view(n_classes, n_classes)
    return counts / counts.sum(dim=1, keepdim=True)


def save_confusions(path, tables, classes):
    """A picture of tables (classes, classes) for each judge: a dictionary from (judge, name of the images)."""
    figure, axes = plt.subplots(len(tables) // 2, 2, figsize=(12, 5.8 * len(tables) // 2), squeeze=False)
    for axis, ((judge, images), table) in zip(axes.flat, tables.items(), strict=True):
        axis.imshow(table.numpy() ** 0.5, cmap="gray_r", vmin=0, vmax=1.4)  # the root shows small shares, too
        for row, column in (table >= 0.005).nonzero().tolist():
            share = float(table[row, column])
            color = "white" if share > 0.3 else "black"
            axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), classes)
        axis.set(title=f"{images}, judge {judge!r}: {table.diagonal().mean():.1%} right")
    figure.suptitle("Of 100 images of a class (row), how many are taken for which class (column)")
    lesson1.save_picture(figure, path)


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


def measure_copies(path, images, baselines, train, test, device, columns=10):
    """Print how near samples come to training images, beside how near test images do, and draw the nearest pairs."""
    training_images, test_images = (to_range(torch.from_numpy(part.images)) for part in (train, test))
    sets = {"samples": images, "test images": test_images}
    sets |= {"training images": baselines.images, "white noise": baselines.noise}
    nearest = {}
    for name, x in sets.items():
        but = baselines.numbers if name == "training images" else None
        nearest[name] = [part.cpu() for part in find_nearest(x.to(device), training_images.to(device), but)]
    limit = nearest["test images"][1].quantile(0.01)
    print("\ndistance to the nearest training image (of a training image: to the nearest other one; of a copy: 0)")
    print(f"{'':26}{'median':>10}{'10 %':>10}{'1 %':>10}{'smallest':>10}{f'below {limit:.3f}':>14}")
    for name, (_, distances) in nearest.items():
        quantiles = "".join(f"{distances.quantile(q):10.3f}" for q in (0.5, 0.1, 0.01, 0))
        print(f"{name:26}{quantiles}{(distances < limit).float().mean():14.1%}")
    rows, smallest = {}, []
    for name in ("samples", "test images"):
        found, distances = nearest[name]
        first = distances.argsort()[:columns]
        rows |= {name: sets[name][first], f"nearest to {name}": training_images[found[first]]}
        smallest.append(f"{distances.min():.3f} for {name}")
    title = f"The nearest to any training image: at a distance of {', '.join(smallest)}"
    lesson1.save_picture(lesson1.plot_grid(title, torch.cat(list(rows.values())), columns, rows), path)


# %% The measurement of one checkpoint
def measure(options, denoiser, run, train, test, panel):
    """All figures of one checkpoint, with the settings of the command line."""
    images, labels = draw_samples(denoiser, run, options.n, options.steps, options.guidance, options.method)
    baselines = Baselines(train, options.n)
    sets = {"samples": panel.judge(images, labels), **dict(baselines.judge(panel))}
    print_table(" " * 26, sets.items())
    if labels is not None:
        tables, n_classes = {}, len(run.classes)  # the judges have seen the training images, so test images, too
        for judge in panel.judges:
            for name, asked in {"samples": labels, "training images": baselines.labels}.items():
                tables[judge, name] = count_confusions(asked, sets[name][judge].taken_for, n_classes)
            tables[judge, "test images"] = count_confusions(panel.labels, panel.seen[judge][1], n_classes)
        print("\ntaken for the class asked for, %")
        for place in (0, 1):
            print(" " * 14 + "".join(f"{key[place]:>17}" for key in tables))
        for label, name in enumerate(run.classes):
            print(f"{name:14}" + "".join(f"{100 * table[label, label]:17.1f}" for table in tables.values()))
        drawn = {key: table for key, table in tables.items() if key[1] != "training images"}
        save_confusions(options.out / "confusion.png", drawn, run.classes)
    measure_copies(options.out / "nearest.png", images, baselines, train, test, denoiser.device)


# %% The sweep
def sweep(options, denoiser, run, train, panel):
    """Distances against steps, and against guidance where there is a label; the other is the command line's."""
    floor = panel.judge(Baselines(train, options.n).images)
    swept = {"steps": [(steps, options.guidance) for steps in sorted({*SWEPT_STEPS, options.steps})]}
    if options.guidance is not None:
        swept["guidance"] = [(options.steps, guidance) for guidance in sorted({*SWEPT_GUIDANCE, options.guidance})]
    found = {}  # (steps, guidance): the verdicts

    def measure_settings():
        for steps, guidance in dict.fromkeys(setting for settings in swept.values() for setting in settings):
            drawn = draw_samples(denoiser, run, options.n, steps, guidance, options.method)
            found[steps, guidance] = panel.judge(*drawn)
            told = "-" if guidance is None else f"{guidance:g}"
            yield f"{steps:5}{count_evaluations(options.method, steps):13}{told:>10}", found[steps, guidance]
        yield "training images", floor

    print_table("steps  evaluations  guidance", measure_settings())
    figure, axes = plt.subplots(1, len(swept), figsize=(8, 4.2), squeeze=False, sharey=True)
    for place, (axis, (xlabel, settings)) in enumerate(zip(axes[0], swept.items(), strict=True)):
        x = [setting[place] for setting in settings]
        lines = {name: [found[setting][name].distances[0] for setting in settings] for name in panel.judges}
        lesson1.plot_lines(axis, x, lines, xlabel=xlabel)
        axis.set_xticks((SWEPT_STEPS, SWEPT_GUIDANCE)[place])  # without the value that was asked for, between them
        for name, line in zip(panel.judges, axis.get_lines(), strict=True):
            axis.axhline(floor[name].distances[0], linestyle=line.get_linestyle(), color="0.7", zorder=0)
    highest = max(verdict.distances[0] for verdicts in found.values() for verdict in verdicts.values())
    axes[0, 0].set_ylim(0, 1.05 * highest)  # of both pictures
    axes[0, 0].set_ylabel("Fréchet distance to the test images\n(grey: of as many training images)")
    figure.suptitle(f"{run.title}: {options.n:,} samples, {options.method}")
    lesson1.save_picture(figure, options.out / f"sweep_{options.method}.png")


# %% The ladder
def climb(options, train, panel):
    """Train the four networks, on the same images, and sample each; the last one with guidance, too.

    The same budget is the same number of images, in the same batches with the same noise: so it doesn't depend on how
    fast the machine is. What a network takes longer for them stands in the table.
    """
    networks = {}
    for name, model in MODELS.items():
        print()
        path = options.out / name / "checkpoint.pt"
        path.parent.mkdir(exist_ok=True)
        networks[name], run = lesson3.get_denoiser(options, model, path)
    rungs = {
        "without time": ("UntimedUNet", None),
        "with time": ("TimeUNet", None),
        "with attention": ("UnlabelledUNet", None),
        "with the label": ("CondUNet", 0.0),
        f"with guidance {options.guidance:g}": ("CondUNet", options.guidance),
    }
    milliseconds, shown, found = measure_milliseconds(networks, run), [], {}

    def measure_rungs():
        for rung, (name, guidance) in rungs.items():
            images, labels = draw_samples(networks[name], run, options.n, options.steps, guidance, options.method)
            shown.append(images[:10])
            found[rung] = panel.judge(images, labels)
            parameters = sum(parameter.numel() for parameter in networks[name].parameters())
            yield f"{rung:18}{parameters:12,}{milliseconds[name]:8.2f}", found[rung]
        yield from Baselines(train, options.n).judge(panel)

    title = f"{run.data}, preset {run.preset}, {run.steps:,} steps of training each; {options.n:,} samples"
    print(f"\n{title}\nms: training on one image, without the optimiser")
    print_table(f"{'':18}{'parameters':>12}{'ms':>8}", measure_rungs())
    save_ladder(options.out / "ladder.png", title, shown, found)


def measure_milliseconds(denoisers, run):
    """What a forward and backward pass takes for one image of a batch; denoisers: a dictionary. Returns another."""
    x = lesson3.pad(torch.randn(run.batch_size, 1, *run.size), lesson3.PRESETS[run.preset])
    trained = [copy.deepcopy(denoiser).requires_grad_() for denoiser in denoisers.values()]
    layers = [functools.partial(denoiser, sigma=torch.ones(len(x))) for denoiser in trained]
    seconds = lesson2.measure_seconds(layers, x.to(trained[0].device), enough=5)
    return {name: 1000 * value / len(x) for name, value in zip(denoisers, seconds, strict=True)}


def save_ladder(path, title, shown, found):
    """A row of samples for each rung, and its distances beside them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(2, 1))
    lesson1.plot_images(left, torch.cat(shown), 10, found)
    for place, judge in enumerate(ARCHITECTURES):
        values = [verdicts[judge].distances[0] for verdicts in found.values()]
        y = np.arange(len(values)) + 0.36 * (place - 0.5)
        bars = right.barh(y, values, height=0.32, color=("black", "0.7")[place], label=f"judge {judge!r}")
        right.bar_label(bars, fmt="%.2f", padding=3)
    right.set(yticks=[], xlabel="Fréchet distance to the test images", ylim=(len(found) - 0.5, -0.5))
    right.margins(x=0.15)
    right.legend()
    figure.suptitle(title)
    lesson1.save_picture(figure, path)


# %% The command
def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, count = parser.add_argument, lesson3.number(int, 1, 10**6)
    n = "samples ({measure:,}; sweep {sweep:,}; ladder {ladder:,})".format(**SAMPLES)
    add("checkpoint", metavar="CHECKPOINT", nargs="?", type=Path, help="checkpoint.pt of a run of 03 or 04")
    add("--n", metavar="N", type=lesson3.number(int, 20, 60_000), help=n)
    add("--method", choices=("ddim", "dpm++", "heun"), default="dpm++", help="the sampler (%(default)s)")
    steps = "to a sample (%(default)s); heun: two evaluations each"
    add("--steps", metavar="S", type=count, default=lesson3.STEPS, help=steps)
    add("--guidance", metavar="W", type=lesson3.number(float, 0, 100), help="where there is a label (as in 04)")
    add("--sweep", action="store_true", help="the distance against steps, and against guidance")
    add("--data-dir", metavar="DIR", help="folder with the four Fashion-MNIST files, also $FASHION_MNIST_DIR")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s: the fastest there is)")
    out = "folder for pictures (quality/ beside the checkpoint, or runs/ladder)"
    add("--out", metavar="DIR", type=lesson1.folder, help=out)
    ladder = parser.add_argument_group("the ladder").add_argument
    ladder("--ladder", action="store_true", help="train and measure the networks of lessons 3 and 4")
    ladder("--epochs", metavar="E", type=lesson3.number(float, 1e-9, 1e5), help=f"for each network ({LADDER_EPOCHS})")
    ladder("--preset", choices=lesson3.PRESETS, help="(small)")
    ladder("--restart", action="store_true", help="train anew, whatever checkpoints are there")
    parser.set_defaults(data="fashion-mnist", batch_size=None, seed=0, sample_only=False, show=False)  # for lesson 3
    return parser


def work(options):
    """Do what the command line asks for. Raises UserError, DataError or OSError."""
    if options.ladder == bool(options.checkpoint):
        raise UserError("either a CHECKPOINT, or --ladder, which trains its own")
    if options.ladder and options.sweep:
        raise UserError("--sweep needs a CHECKPOINT; the ladder's are in runs/ladder")
    if not options.ladder and (options.epochs or options.preset or options.restart):
        raise UserError("--epochs, --preset and --restart are the ladder's: a CHECKPOINT is measured as it is")
    options.epochs, options.preset = options.epochs or LADDER_EPOCHS, options.preset or "small"
    options.n = options.n or SAMPLES["ladder" if options.ladder else "sweep" if options.sweep else "measure"]
    device, epochs, sources = lesson3.choose_device(options.device), options.epochs, {}
    if options.checkpoint:
        denoiser, run = load_denoiser(options.checkpoint, device)
        epochs, sources[options.checkpoint] = run.epochs, (run.classes, run.data)
        if options.guidance is not None and run.network != "CondUNet":
            raise UserError(f"--guidance: {run.network} in {options.checkpoint} has no label to be guided by")
    train, test = (lesson3.load_once(split=split, **lesson3.DATA) for split in data.SPLITS)
    if options.guidance is None and (options.ladder or run.network == "CondUNet"):
        options.guidance = lesson4.choose_guidance(epochs * (len(train.images) if options.ladder else run.images))
    sources |= {"training images": train[2:], "test images": test[2:]}
    for place, (classes, name) in sources.items():
        if (classes, name) != (data.fashion_mnist.CLASSES, "Fashion-MNIST"):
            raise UserError(f"{place}: the judges know Fashion-MNIST's own files alone, and not {name!r}")
    out = options.out or (ROOT / "runs" / "ladder" if options.ladder else options.checkpoint.parent / "quality")
    try:
        options.out = lesson1.folder(out)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--out {error}") from error
    panel = Panel(train, test, device)
    evaluations = count_evaluations(options.method, options.steps)
    told = "" if options.guidance is None else f", guidance {options.guidance:g}"
    print(
        f"samples   {options.n:,} with {options.method}, {options.steps} steps ({evaluations} evaluations each){told}"
    )
    if options.ladder:
        climb(options, train, panel)
    elif options.sweep:
        sweep(options, denoiser, run, train, panel)
    else:
        measure(options, denoiser, run, train, test, panel)


def main():
    parser = make_parser()
    lesson3.start(parser, parser.parse_args(), work)


if __name__ == "__main__":
    main()
