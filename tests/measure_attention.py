"""Where attention must matter: two marks in opposite corners, whose patterns have to be the same. Run by hand.

    python tests/measure_attention.py [--steps N] [--seeds S] [--n N] [--out DIR]

Lesson 4's U-Net with one level, which never goes down, has twelve 3×3 convolutions from the first to the last: they
carry what a pixel holds twelve pixels far, and eighteen lie between the marks. A group norm would be
another way across, as all pixels meet in its mean; so here a norm keeps to each pixel. It is trained with and without
attention in the middle, on the same images in the same order, and the samples are counted whose marks are the same.

On Fashion-MNIST, `measure_recipe.py --images 180000 --n 5000 --seeds 0 1 2 --rungs 9 10` says what attention is worth.
"""

import copy
import importlib
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
lesson1 = importlib.import_module("01_time_embedding")
lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")

SIDE, MARK, EDGE = 28, 4, 1  # pixels of an image, of a mark, and from a mark to the edge
WIDTH, BATCH_SIZE = 16, 32
ROWS, COLUMNS = torch.meshgrid(torch.arange(MARK) // 2, torch.arange(MARK) // 2, indexing="ij")
PATTERNS = torch.stack([ROWS, COLUMNS, 1 - ROWS, 1 - COLUMNS]).float()  # which half of a mark is lit
CORNERS = slice(EDGE, EDGE + MARK), slice(SIDE - EDGE - MARK, SIDE - EDGE)  # of the first mark and of the second


def draw_pairs(n, generator):
    """n images, uint8 `(n, 1, 28, 28)`, in each the same pattern top left and bottom right."""
    images = torch.zeros(n, 1, SIDE, SIDE, dtype=torch.uint8)
    pattern = (255 * PATTERNS[torch.randint(len(PATTERNS), (n,), generator=generator)]).byte()
    for corner in CORNERS:
        images[:, 0, corner, corner] = pattern
    return images


def read_marks(images):
    """The pattern that each of the two marks of images `(n, 1, 28, 28)` in [-1, 1] is nearest to: `(n, 2)`."""
    marks = torch.stack([images[:, 0, corner, corner] for corner in CORNERS], dim=1)  # n 2 h w
    return torch.cdist(marks.flatten(2), (2 * PATTERNS - 1).flatten(1)).argmin(dim=2)


class PixelNorm(nn.GroupNorm):
    """A norm that takes mean and variance over the channels of each pixel by itself (as a transformer's does)."""

    def forward(self, x):
        return super().forward(x.movedim(1, 3).flatten(0, 2)).view(*x.movedim(1, 3).shape).movedim(3, 1)


def make_network(attention):
    network = lesson4.CondUNet(1, (WIDTH,), depth=1, groups=1, attention_levels=(), head_dim=WIDTH, n_classes=1)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = PixelNorm
    if not attention:
        network.middle[0].attention = nn.Identity()
    return network


def measure(attention, seed, steps, n):
    """The share of n samples whose marks are the same, how often each pattern comes, and the samples."""
    torch.manual_seed(seed)
    images = draw_pairs(10_000, torch.Generator().manual_seed(seed))
    denoiser = lesson3.Denoiser(make_network(attention), float((images / 127.5 - 1).std()))
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    labels, optimizers = torch.zeros(len(images), dtype=torch.int64), lesson3.make_optimizers(denoiser, 2e-3)
    batches = (batch[:-1] for batch in lesson3.draw_batches(images, labels, BATCH_SIZE, seed, range(steps)))
    for _ in tqdm(lesson3.train(denoiser, ema, optimizers, batches, steps), total=steps, leave=False, disable=None):
        pass
    noise = torch.stack([lesson3.starting_noise(seed, 0, i, (1, SIDE, SIDE)) for i in range(n)])
    samples = []
    for part in noise.split(100):
        *_, (_, x, _) = lesson3.sample(ema, part, lesson3.noise_levels())
        samples.append(x.clamp(-1, 1))
    marks = read_marks(torch.cat(samples))
    return (marks[:, 0] == marks[:, 1]).float().mean().item(), marks[:, 0].bincount(minlength=4) / n, samples[0]


def work(options):
    rows, shown = ["images"], [draw_pairs(10, torch.Generator().manual_seed(0)) / 127.5 - 1]
    print(f"{options.steps:,} steps of {BATCH_SIZE} images; of {options.n} samples, those whose marks are the same")
    for seed in range(options.seeds):
        for attention in (False, True):
            began, name = time.perf_counter(), f"{'with' if attention else 'without'} attention, seed {seed}"
            same, shares, samples = measure(attention, seed, options.steps, options.n)
            patterns = " ".join(f"{share:.0%}" for share in shares)
            print(f"   {name:26}{same:7.1%}   patterns {patterns}   {time.perf_counter() - began:.0f} s", flush=True)
            rows, shown = [*rows, name.replace(", ", "\n")], [*shown, samples[:10]]
    title = "Two marks that have to match: what attention brings"
    lesson1.save_picture(lesson1.plot_grid(title, torch.cat(shown), 10, rows), options.out / "marks.png")


def main():
    parser, count = lesson1.make_parser(ROOT / Path(__file__).name, __doc__), lesson3.number(int, 1, 10**6)
    parser.add_argument("--steps", type=count, default=2000, help="of training (%(default)s)")
    parser.add_argument("--seeds", type=count, default=3, help="(%(default)s)")
    parser.add_argument("--n", type=count, default=400, help="samples (%(default)s)")
    parser.set_defaults(data="garments", data_dir=None, sample_only=False, show=False)  # for lesson 3
    lesson3.start(parser, parser.parse_args(), work)


if __name__ == "__main__":
    main()
