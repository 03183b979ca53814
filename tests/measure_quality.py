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
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from judge import ARCHITECTURES, JudgeError, get_judge, look, to_range
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
class UnlabelledUNet(lesson4.CondUNet):
    """CondUNet that is never told a label: what attention alone is worth."""

    def training_label(self, label, generator):
        return torch.full_like(label, self.n_classes)


NETWORKS = {kind.__name__: kind for kind in (lesson3.UNet, lesson3.TimeUNet, UnlabelledUNet, lesson4.CondUNet)}


def load_denoiser(path, device):
    """The averaged denoiser in a checkpoint of lesson 3, lesson 4 or the ladder, and its `Run`. Raises UserError."""
    checkpoint = lesson3.load_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path}: no checkpoint there")
    run = checkpoint["run"]
    if run.network not in NETWORKS or run.preset not in lesson3.PRESETS:
        raise UserError(f"{path}: not a network of these lessons, or of another version of them")
    denoiser = lesson3.make_denoiser(run, NETWORKS[run.network], device, checkpoint["average"])
    print(f"network   {run.title}, after {checkpoint['step']:,} of {run.steps:,} steps")
    return denoiser.eval().requires_grad_(False), run


def count_evaluations(method, steps):
    """The network evaluations of a method that is allowed so many: Heun's takes two a step, but one in the last."""
    return steps - (method == "heun" and steps % 2 == 0)


def draw_samples(denoiser, run, n, steps=18, guidance=None, method="dpm++", batch_size=250):
    """n images, float32 (n, 1, height, width) in [-1, 1], and the labels (n,) asked for: the classes in turn.

    steps: network evaluations a sample, as `count_evaluations` allows. guidance: None if no label is given; then the
    second result is None, too.
    """
    counts = torch.arange(n)
    labels = None if guidance is None else counts % len(run.classes)
    sigmas = lesson3.noise_levels((steps + 1) // 2 if method == "heun" else steps)
    images = []
    for chosen in tqdm(counts.split(batch_size), desc="sampling", leave=False, disable=None):
        if labels is None:
            starts, denoise = [(0, 0, i) for i in chosen.tolist()], denoiser
        else:
            starts = [(0, i % len(run.classes), i // len(run.classes)) for i in chosen.tolist()]
            denoise = lesson4.guide(denoiser, labels[chosen].to(denoiser.device), guidance)
        noise = lesson3.draw_noise(run, denoiser.device, starts)
        *_, (_, x, _) = lesson3.sample(denoise, noise, sigmas, method)
        images.append(lesson3.crop(x, run.size).clamp(-1, 1).cpu())
    return torch.cat(images), labels


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


# %% What the judges say
class Verdict(NamedTuple):
    """What a judge says of a set of images."""

    distances: list[float]  # Fréchet and 1000 × kernel distance, of plain features and then of standardised ones
    taken_for: torch.Tensor  # the class of each image, (n,)
    right: float | None  # the share that is taken for the class asked for, if one was


COLUMNS = f"{'Fréchet':>12}{'kernel':>14}"


def show_right(right):
    return f"{'-' if right is None else f'{right:.1%}':>13}"


def print_both(head, rows):
    """A table with the distances on plain features and the share of right classes of both judges, line by line as they
    are measured; rows: (beginning, verdicts) of each."""
    print(" " * len(head) + "".join(f"{f'judge {name!r}':>39}" for name in ARCHITECTURES))
    print(head + (COLUMNS + f"{'right class':>13}") * len(ARCHITECTURES))
    for beginning, verdicts in rows:
        cells = ("{:12.3f}{:14.3f}".format(*v.distances[:2]) + show_right(v.right) for v in verdicts.values())
        print(f"{beginning:{len(head)}}" + "".join(cells), flush=True)


def measure_distances(features, expected):
    """As in `Verdict`, between features (n, d) and those of the test images (m, d).

    Standardised, a feature that hardly varies counts as much as any other. One that is (nearly) constant on the test
    images says nothing there, and is left out.
    """
    mean, deviation = expected.mean(axis=0), expected.std(axis=0)
    alive = deviation > 1e-3 * deviation.max()
    standardised = [((x - mean) / np.where(alive, deviation, 1))[:, alive] for x in (features, expected)]
    return [
        distance
        for pair in ((features, expected), standardised)
        for distance in (reference.frechet_distance(*pair), 1000 * reference.kernel_distance(*pair))
    ]


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


def save_nearest(path, sets, others, columns=10):
    """A picture of the pairs with the smallest distances; sets: a dictionary to (images, numbers, distances)."""
    rows, names, smallest = [], [], []
    for name, (images, found, distances) in sets.items():
        first = distances.argsort()[:columns]
        rows += [images[first], others[found[first]]]
        names += [name, "nearest in training"]
        smallest.append(f"{distances.min():.3f} for {name}")
    title = f"The nearest to any training image: at a distance of {', '.join(smallest)}"
    lesson3.save_images(path, title, torch.cat(rows), columns, names)


def measure_copies(path, images, baselines, train, test, device):
    """Print how near samples come to training images, beside how near test images do, and draw the nearest pairs."""
    training_images = to_range(torch.from_numpy(train.images))
    sets = {
        "samples": (images, None),
        "test images": (to_range(torch.from_numpy(test.images)), None),
        "training images": (baselines.images, baselines.numbers),
        "white noise": (baselines.noise, None),
    }
    nearest = {}
    for name, (x, but) in sets.items():
        found = find_nearest(x.to(device), training_images.to(device), but)
        nearest[name] = x, *(part.cpu() for part in found)
    limit = nearest["test images"][2].quantile(0.01)
    print("\ndistance to the nearest training image (of a training image: to the nearest other one; of a copy: 0)")
    print(f"{'':26}{'median':>10}{'10 %':>10}{'1 %':>10}{'smallest':>10}{f'below {limit:.3f}':>14}")
    for name, (_, _, distances) in nearest.items():
        quantiles = "".join(f"{distances.quantile(q):10.3f}" for q in (0.5, 0.1, 0.01, 0))
        print(f"{name:26}{quantiles}{(distances < limit).float().mean():14.1%}")
    save_nearest(path, {name: nearest[name] for name in ("samples", "test images")}, training_images)


# %% The measurement of one checkpoint
def measure(options, denoiser, run, train, test, panel):
    """All figures of one checkpoint, with the settings of the command line."""
    told = "" if options.guidance is None else f", guidance {options.guidance:g}"
    print(f"samples   {options.n:,} with {options.method}, {options.steps} evaluations each{told}")
    images, labels = draw_samples(denoiser, run, options.n, options.steps, options.guidance, options.method)
    baselines = Baselines(train, options.n)
    sets = {
        "samples": panel.judge(images, labels),
        "training images": panel.judge(baselines.images, baselines.labels),
        "white noise": panel.judge(baselines.noise, labels),
    }
    print(f"\ndistances of {len(images):,} each to the {len(test.images):,} test images (kernel: times 1000)")
    for judge in panel.judges:
        print(f"{f'judge {judge!r}':26}{'plain features':>26}{'standardised features':>26}")
        print(" " * 26 + COLUMNS * 2 + ("" if labels is None else f"{'right class':>13}"))
        for name, verdicts in sets.items():
            distances, _, right = verdicts[judge]
            cells = "{:12,.3f}{:14,.3f}{:12,.3f}{:14,.3f}".format(*distances)
            print(f"{name:26}{cells}{'' if labels is None else show_right(right)}")
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
    counts = sorted({count_evaluations(options.method, steps) for steps in SWEPT_STEPS})
    swept = {"network evaluations a sample": [(steps, options.guidance) for steps in sorted({*counts, options.steps})]}
    if options.guidance is not None:
        swept["guidance"] = [(options.steps, guidance) for guidance in sorted({*SWEPT_GUIDANCE, options.guidance})]
    found = {}  # (steps, guidance): the verdicts

    def measure_settings():
        for steps, guidance in dict.fromkeys(setting for settings in swept.values() for setting in settings):
            drawn = draw_samples(denoiser, run, options.n, steps, guidance, options.method)
            found[steps, guidance] = panel.judge(*drawn)
            yield f"{steps:11}{'-' if guidance is None else f'{guidance:g}':>10}", found[steps, guidance]
        yield "training images", floor

    print(f"\n{options.method}, {options.n:,} samples each; distances on plain features (kernel: times 1000)")
    print_both("evaluations  guidance", measure_settings())
    figure, axes = plt.subplots(1, len(swept), figsize=(8, 4.2), squeeze=False, sharey=True)
    for place, (axis, (xlabel, settings)) in enumerate(zip(axes[0], swept.items(), strict=True)):
        x = [setting[place] for setting in settings]
        lines = {name: [found[setting][name].distances[0] for setting in settings] for name in panel.judges}
        lesson3.plot_lines(axis, x, lines, xlabel=xlabel, xticks=(counts, SWEPT_GUIDANCE)[place])
        for name, style in zip(panel.judges, "-:", strict=False):
            axis.axhline(floor[name].distances[0], linestyle=style, color="0.7", zorder=0)
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
    for name, network_class in NETWORKS.items():
        print()
        settings = argparse.Namespace(**vars(options))
        settings.out = options.out / name
        settings.out.mkdir(exist_ok=True)
        networks[name] = lesson3.get_denoiser(settings, network_class)
    rungs = {
        "without time": ("UNet", None),
        "with time": ("TimeUNet", None),
        "with attention": ("UnlabelledUNet", None),
        "with the label": ("CondUNet", 0.0),
        f"with guidance {options.guidance:g}": ("CondUNet", options.guidance),
    }
    _, run = networks["CondUNet"]
    milliseconds = measure_milliseconds({name: denoiser for name, (denoiser, _) in networks.items()}, run)
    shown, found = [], {}

    def measure_rungs():
        for rung, (name, guidance) in rungs.items():
            denoiser, run = networks[name]
            images, labels = draw_samples(denoiser, run, options.n, options.steps, guidance, options.method)
            shown.append(images[:10])
            found[rung] = panel.judge(images, labels)
            parameters = sum(parameter.numel() for parameter in denoiser.parameters())
            yield f"{rung:18}{parameters:12,}{milliseconds[name]:8.2f}", found[rung]
        baselines = Baselines(train, options.n)
        yield "training images", panel.judge(baselines.images, baselines.labels)
        yield "white noise", panel.judge(baselines.noise, baselines.labels)

    title = f"{run.data}, preset {run.preset}, {run.steps:,} steps of training each; {options.n:,} samples"
    print(f"\n{title}, {options.method}, {options.steps} evaluations a sample")
    print("ms: training on one image, without the optimiser; distances on plain features (kernel: times 1000)")
    print_both(f"{'':18}{'parameters':>12}{'ms':>8}", measure_rungs())
    save_ladder(options.out / "ladder.png", title, shown, found)


def measure_milliseconds(denoisers, run):
    """What a forward and backward pass takes for one image of a batch; denoisers: a dictionary. Returns another."""
    device = next(iter(denoisers.values())).device
    x = lesson3.draw_noise(run, device, [(0, 0, index) for index in range(run.batch_size)])
    sigma = torch.ones(len(x), device=device)
    trained = [copy.deepcopy(denoiser).requires_grad_() for denoiser in denoisers.values()]
    layers = [lambda x, denoiser=denoiser: denoiser(x, sigma) for denoiser in trained]
    seconds = lesson2.measure_seconds(layers, x, enough=5)
    return {name: 1000 * value / len(x) for name, value in zip(denoisers, seconds, strict=True)}


def save_ladder(path, title, shown, found):
    """A row of samples for each rung, and its distances beside them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(2, 1))
    lesson3.plot_images(left, torch.cat(shown), 10, list(found))
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
class Parser(argparse.ArgumentParser):
    error = lesson1.Parser.error


def make_parser():
    count = lesson3.number(int, 1, "a whole number from 1 up")
    n = lesson3.number(int, 20, "a whole number from 20 up")
    guidance = lesson3.number(float, -100, "a number from -100 up")
    epochs = lesson3.number(float, 1e-9, "a number above 0")
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", type=Path, help="checkpoint.pt of a run of 03 or 04")
    add("--n", metavar="N", type=n, help="samples ({measure:,}; sweep {sweep:,}; ladder {ladder:,})".format(**SAMPLES))
    add("--method", choices=("ddim", "dpm++", "heun"), default="dpm++", help="the sampler (%(default)s)")
    add("--steps", metavar="S", type=count, default=18, help="network evaluations for a sample (%(default)s; heun 17)")
    add("--guidance", metavar="W", type=guidance, help="where there is a label (as in 04)")
    add("--sweep", action="store_true", help="the distance against steps, and against guidance")
    add("--data-dir", metavar="DIR", help="folder with the four Fashion-MNIST files, also $FASHION_MNIST_DIR")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(%(default)s: the fastest there is)")
    add("--out", metavar="DIR", type=Path, help="folder for pictures (quality/ beside the checkpoint, or runs/ladder)")
    ladder = parser.add_argument_group("the ladder")
    ladder.add_argument("--ladder", action="store_true", help="train and measure the networks of lessons 3 and 4")
    ladder.add_argument("--epochs", metavar="E", type=epochs, help=f"for each network ({LADDER_EPOCHS})")
    ladder.add_argument("--preset", choices=lesson3.PRESETS, help="(small)")
    ladder.add_argument("--restart", action="store_true", help="train anew, whatever checkpoints are there")
    parser.set_defaults(data="fashion-mnist", batch_size=None, seed=0, sample_only=False)  # for get_denoiser
    return parser


def start(options):
    """Do what the command line asks for. Raises UserError, DataError or JudgeError."""
    if options.ladder == bool(options.checkpoint):
        raise UserError("either a CHECKPOINT, or --ladder, which trains its own")
    if options.ladder and options.sweep:
        raise UserError("--sweep needs a CHECKPOINT; the ladder's are in runs/ladder")
    if not options.ladder and (options.epochs or options.preset or options.restart):
        raise UserError("--epochs, --preset and --restart are the ladder's: a CHECKPOINT is measured as it is")
    options.epochs, options.preset = options.epochs or LADDER_EPOCHS, options.preset or "small"
    options.device = lesson3.choose_device(options.device)
    options.steps = count_evaluations(options.method, options.steps)
    options.n = options.n or SAMPLES["ladder" if options.ladder else "sweep" if options.sweep else "measure"]
    if options.checkpoint:
        denoiser, run = load_denoiser(options.checkpoint, options.device)
        if options.guidance is not None and run.network != "CondUNet":
            raise UserError(f"--guidance: {run.network} in {options.checkpoint} has no label to be guided by")
    if options.guidance is None and (options.ladder or run.network == "CondUNet"):
        options.guidance = lesson4.choose_guidance(options.epochs if options.ladder else run.epochs)
    train, test = (data.load("fashion-mnist", split, options.data_dir) for split in data.SPLITS)
    sources = {"training images": train[2:], "test images": test[2:]}  # classes, name
    if options.checkpoint:
        sources[options.checkpoint] = run.classes, run.data
    for place, source in sources.items():
        if source != (data.fashion_mnist.CLASSES, "Fashion-MNIST"):
            raise UserError(f"{place}: the judges know Fashion-MNIST's own files alone, and not {source[1]!r}")
    if options.n > len(train.labels):
        raise UserError(f"--n {options.n}: at most {len(train.labels)}, for as many training images stand beside them")
    options.out = options.out or (ROOT / "runs" / "ladder" if options.ladder else options.checkpoint.parent / "quality")
    try:
        lesson1.make_folder(options.out)
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written to ({error})") from error
    panel = Panel(train, test, options.device)
    if options.ladder:
        climb(options, train, panel)
        return
    if options.sweep:
        sweep(options, denoiser, run, train, panel)
    else:
        measure(options, denoiser, run, train, test, panel)


def main():
    parser = make_parser()
    try:
        start(parser.parse_args())
    except (UserError, data.DataError, JudgeError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


if __name__ == "__main__":
    main()
