"""A task that needs attention: two bars, far apart, have to match.

    python tests/measure_attention.py [--steps N] [--seeds S] [--n N] [--out DIR]

An image is grey, with a bar along its left edge and one along its right; both are white, or both are black. Lesson 4's
U-Net has a single level here and never downsamples, so its twelve 3×3 convolutions reach only twelve pixels, and the
bars are sixteen apart. A group norm would be another way across, as its mean takes in all pixels; so here each pixel is
normalised by itself. We train the network with and without attention in its middle, on the same images in the same
order, and count the samples whose bars match.

For what attention is worth on Fashion-MNIST, see the row "no attention" of `measure_recipe.py`.
"""

import copy
import importlib
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lesson_tools as tools

lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")

SIDE, BAR, WIDTH, BATCH_SIZE = 28, 6, 16, 32
BARS = slice(0, BAR), slice(SIDE - BAR, SIDE)  # columns


def draw_pairs(n, generator):
    """n images, uint8 `(n, 1, 28, 28)`, each with two bars of the same colour."""
    images = torch.full((n, 1, SIDE, SIDE), 128, dtype=torch.uint8)
    colour = (255 * torch.randint(2, (n, 1, 1, 1), generator=generator)).byte()
    for bar in BARS:
        images[..., bar] = colour
    return images


def bars_match(images):
    """Whether the bars of each image `(n, 1, 28, 28)` in [-1, 1] are both closer to white or both to black, `(n,)`."""
    left, right = (images[..., bar].mean(dim=(1, 2, 3)) > 0 for bar in BARS)
    return left == right


class PixelNorm(nn.GroupNorm):
    """Takes mean and variance over the channels of each pixel separately (as a transformer does)."""

    def forward(self, x):
        pixels = x.movedim(1, 3)  # n h w c
        return super().forward(pixels.flatten(0, 2)).view(pixels.shape).movedim(3, 1)


def make_network(attention):
    network = lesson4.CondUNet(1, (WIDTH,), depth=1, groups=1, attention_levels=(), head_dim=WIDTH, n_classes=1)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = PixelNorm
    if not attention:
        network.middle[0].attention = nn.Identity()
    return network


def train_and_sample(attention, seed, steps, n):
    """n samples, `(n, 1, 28, 28)`, from a network trained on pairs of bars."""
    torch.manual_seed(seed)
    images = draw_pairs(10_000, torch.Generator().manual_seed(seed))
    denoiser = lesson3.Denoiser(make_network(attention), float((images / 127.5 - 1).std()))
    ema, optimizers = copy.deepcopy(denoiser).requires_grad_(False), lesson3.use_muon(denoiser.parameters(), 3e-3)
    no_label = torch.ones(len(images), dtype=torch.int64)  # n_classes
    batches = lesson3.draw_batches(images, no_label, BATCH_SIZE, seed, range(steps))
    for _ in lesson3.train(denoiser, ema, optimizers, batches, steps):
        pass
    noise, samples = torch.stack([lesson3.starting_noise(seed, 0, i, (1, SIDE, SIDE)) for i in range(n)]), []
    for part in noise.split(100):
        *_, (_, x, _) = lesson3.sample_dpm(ema, part, lesson3.noise_levels())
        samples.append(x)
    return torch.cat(samples)


def main():
    parser, count = tools.make_parser(__file__, __doc__), tools.number(int, 1, 10**6)
    parser.add_argument("--steps", type=count, default=1000, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--n", type=count, default=400, help="samples per network (default: %(default)s)")
    options = parser.parse_args()
    lesson3.P_MEAN = 2.7  # the colour of so large a bar is decided at a sigma of about 15
    shown = {"images": draw_pairs(10, torch.Generator().manual_seed(0)) / 127.5 - 1}
    print(f"{options.steps:,} steps of {BATCH_SIZE} images; the share of {options.n} samples whose bars match")
    for seed in range(options.seeds):
        for attention in (False, True):
            began, name = time.perf_counter(), f"{'with' if attention else 'without'} attention, seed {seed}"
            samples = train_and_sample(attention, seed, options.steps, options.n)
            share = bars_match(samples).float().mean()
            print(f"   {name:26}{share:7.1%}   {time.perf_counter() - began:.0f} s", flush=True)
            shown[name] = samples[:10].clamp(-1, 1)
    images = torch.cat(list(shown.values()))
    tools.save_picture(options.out / "bars.png", tools.plot_grid, "Two bars that have to match", images, 10, shown)


if __name__ == "__main__":
    tools.run_command(main)
