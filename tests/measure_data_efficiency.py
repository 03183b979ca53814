"""Does a transformer need a lot of data? Test accuracy against the number of labelled images, run by hand.

Three learners with the same number of parameters, the same steps and the same optimiser: the vision transformer of
lesson 2, a convolutional net, and the same transformer after it has learned, from all training images but without
their labels, to fill in patches that are hidden (Xie et al. 2022). Each on 1 %, 4 % and 16 % of the training set.

    python tests/measure_data_efficiency.py [--data NAME] [--out DIR] [--seeds S] [--steps N] [--pretraining-steps N]

It takes about ten minutes on two CPU cores.
"""

import copy
import importlib
import math
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from classifiers import to_range
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lesson_tools as tools

lesson2 = importlib.import_module("02_attention")

SHARES = (0.01, 0.04, 0.16)
PATCH = 7
BATCH = 64
HIDDEN = 0.5  # share of the patches that pre-training hides


class ConvolutionalNet(nn.Sequential):
    """Five 3×3 convolutions, three of them of stride 2, then the mean over all pixels."""

    def __init__(self, n_classes, width=27):
        channels, layers = (1, width, 2 * width, 2 * width, 4 * width, 4 * width), []
        for before, after, stride in zip(channels, channels[1:], (2, 2, 1, 2, 1), strict=False):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(1, after), nn.GELU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, n_classes))


def train(parameters, loss, images, steps, generator, name):
    """AdamW with warm-up and cosine decay on random batches. loss: a function of the numbers of the chosen images."""

    def rate(step):
        return min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2

    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in tqdm(range(steps), name, leave=False, disable=None):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(chosen).backward()
        optimizer.step()
        schedule.step()


def hide_patches(x, hidden):
    """Pixels of the hidden patches `(n, s)` become zero, a middle grey."""
    size = x.shape[-1] // PATCH
    mask = hidden.unflatten(1, (1, size, size)).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)  # n 1 h w
    return x.masked_fill(mask, 0)


def pretrain(model, images, steps, generator, seed):
    """Teach the transformer to fill in hidden patches: the loss is the squared error of their pixels."""
    fill_in = nn.Linear(model.classify.in_features, PATCH**2)

    def loss(chosen):
        x = to_range(images[chosen])
        patches = model.to_patches(x)  # n s (p q)
        hidden = torch.rand(patches.shape[:2], generator=generator) < HIDDEN
        return F.mse_loss(fill_in(model.encode(hide_patches(x, hidden)))[hidden], patches[hidden])

    parameters = [*model.parameters(), *fill_in.parameters()]
    train(parameters, loss, images, steps, generator, f"pre-training, seed {seed}")


def learn(model, images, labels, steps, generator, name):
    """Teach a model the classes."""

    def loss(chosen):
        return F.cross_entropy(model(to_range(images[chosen])), labels[chosen])

    train(model.parameters(), loss, images, steps, generator, name)


@torch.no_grad()
def accuracy(model, images, labels):
    predicted = torch.cat([model(to_range(batch)).argmax(dim=1) for batch in images.split(1000)])
    return (predicted == labels).float().mean().item()


def measure(train_set, test_set, seeds, steps, pretraining_steps):
    """Test accuracies: a dictionary from each learner's name to `(shares, seeds)`, and the numbers of images."""
    images, labels = (torch.from_numpy(array) for array in (train_set.images, train_set.labels))
    test_images, test_labels = (torch.from_numpy(array) for array in (test_set.images, test_set.labels))
    sizes = [round(share * len(images)) for share in SHARES]
    n_classes, size = len(train_set.classes), images.shape[-1]
    results = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        transformer = lesson2.VisionTransformer(size, PATCH, n_classes=n_classes)
        learners = {"transformer": transformer, "convolutional net": ConvolutionalNet(n_classes)}
        learners["pre-trained transformer"] = pretrained = copy.deepcopy(transformer)
        pretrain(pretrained, images, pretraining_steps, generator, seed)
        order = torch.randperm(len(images), generator=generator)
        for place, n in enumerate(sizes):
            for name, start in learners.items():
                task = f"{name}, {n} images, seed {seed}"
                model = copy.deepcopy(start)
                batches = torch.Generator().manual_seed(seed)  # the same for all learners
                learn(model, images[order[:n]], labels[order[:n]], steps, batches, task)
                correct = accuracy(model, test_images, test_labels)
                print(f"{task}: {correct:.1%}", flush=True)
                results.setdefault(name, torch.zeros(len(sizes), seeds))[place, seed] = correct
    counts = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in learners.items()}
    return results, counts, sizes


def draw(results, sizes, data_name, path):
    """The means over the seeds, with bars from the smallest to the largest."""
    figure, ax = plt.subplots(figsize=(7, 4.5))
    for i, ((name, values), style) in enumerate(zip(results.items(), ("ko--", "k^:", "ks-"), strict=True)):
        percent = 100 * values  # sizes seeds
        middle = percent.mean(dim=1)
        spread = torch.stack([middle - percent.amin(dim=1), percent.amax(dim=1) - middle])
        beside = [n * (0.97 + 0.03 * i) for n in sizes]  # so that the bars don't cover each other
        ax.errorbar(beside, middle, spread, fmt=style, capsize=4, label=name)
    ax.set(xscale="log", xlabel="labelled images", ylabel=f"test accuracy on {data_name} (%)")
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
    ax.legend()
    gaps = 100 * (results["convolutional net"] - results["transformer"]).mean(dim=1)
    gains = 100 * (results["pre-trained transformer"] - results["transformer"]).mean(dim=1)
    ax.set_title(
        f"With {sizes[0]:,} and {sizes[-1]:,} labels, convolution is worth {gaps[0]:+.1f} and {gaps[-1]:+.1f} points,\n"
        f"and pre-training is worth {gains[0]:+.1f} and {gains[-1]:+.1f} points to the transformer",
        fontsize=11,
    )
    tools.save_picture(figure, path)


def main():
    parser, count = tools.make_parser(__file__, __doc__), tools.number(int, 1, 10**6)
    parser.add_argument("--data", choices=data.NAMES, default="auto")
    parser.add_argument("--seeds", type=count, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=count, default=1000, help="of training on labelled images (%(default)s)")
    parser.add_argument("--pretraining-steps", type=count, default=3000, help="without labels (%(default)s)")
    options = parser.parse_args()
    train_set, test_set = (data.load(options.data, split) for split in data.SPLITS)
    began = time.perf_counter()
    results, counts, sizes = measure(train_set, test_set, options.seeds, options.steps, options.pretraining_steps)
    print(f"\n{train_set.name}: test accuracy in %, mean (smallest to largest of {options.seeds} seeds)")
    print(f"{'':45}" + "".join(f"{f'{n} images':>22}" for n in sizes))
    for name, values in results.items():
        cells = (f"{row.mean():.1f} ({row.min():.1f} to {row.max():.1f})" for row in 100 * values)
        print(f"{name + f', {counts[name]:,} parameters':45}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"{time.perf_counter() - began:.0f} s, {time.process_time():.0f} s of processor time")
    draw(results, sizes, train_set.name, options.out / "data_efficiency.png")


if __name__ == "__main__":
    tools.run_command(main)
