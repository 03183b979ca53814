"""Lesson 1: a number becomes a vector.

A diffusion network must know how noisy its input is. One number is a poor way to tell it: a sinusoidal embedding turns
the number into a vector of sines and cosines, fast ones and slow ones (Vaswani et al. 2017, section 3.5; lecture
section "time embedding").

    python 01_time_embedding.py [--out DIR]
"""

# %% What all four scripts share for pictures and folders
import argparse
import math
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.patches import Circle, Wedge
from torch import nn

# Where cells are run one by one there may be no __file__; the editor's folder is then the scripts' folder.
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()

plt.rcParams.update({"figure.constrained_layout.use": True, "image.cmap": "gray", "savefig.dpi": 120})


def make_folder(path):
    """Make a folder where there is none, and write to it: better to know now than after an hour of training. Raises
    OSError."""
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, with exit status 2. --out is where pictures go, by default runs/NAME.

    script: the script's `__file__`, or only its name (a cell may have no `__file__`). description: its docstring.
    """

    def __init__(self, script, description):
        super().__init__(description=(description or "").partition("\n")[0])
        self.script = (HERE / script).resolve()
        out = self.script.parent / "runs" / self.script.stem
        self.add_argument("--out", type=Path, default=out, metavar="DIR", help="folder to write to (%(default)s)")

    def parse_args(self, args=None, namespace=None):
        if args is None and Path(sys.argv[0]).resolve().name != self.script.name:
            args = []  # run cell by cell in an editor: the command line is the editor's
        options = super().parse_args(args, namespace)
        try:
            make_folder(options.out)
        except OSError as error:
            self.error(f"--out must be a folder that can be written to ({error})")
        return options

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def save_picture(figure, path):
    """Write the figure, say so, and close it; in a notebook or an editor's cell, show it too."""
    figure.savefig(path)
    print(f"wrote {path}")
    if plt.isinteractive():
        plt.show()
    plt.close(figure)


if __name__ == "__main__":
    out = Parser("01_time_embedding.py", __doc__).parse_args().out
    numbers = {}  # what the sections find out; the last one prints them


# %% 1. Why: one number is a poor way to say what time it is
# A diffusion network is told a time step, say t = 370 of 1000. As one number, 380 is nearly the same: the way from one
# to the other is a hundredth of that from the first time to the last. A network that is to treat the two differently
# needs very large weights, and it is slow to find them (Tancik et al. 2020).
#
# Clocks have solved this. The second hand tells neighbouring moments apart, the hour hand tells morning from evening,
# and no hand ever leaves the dial. The embedding is a clock with `dim / 2` hands, each written down as the sine and the
# cosine of its angle. Here is all of it; section 2 takes it apart.
def timestep_embedding(timesteps, dim, max_period=10_000):
    """Sines and cosines of each time, at `dim / 2` frequencies from 1 down to `1 / max_period`.

    timesteps: `(n,)`, any real number type, any sign. dim: at least 2; an odd one is padded with a zero column.
    max_period: at least 1; the fastest hand takes `2 pi` for a turn, the slowest `2 pi max_period`.
    Returns `(n, dim)`, sines first, in the type of `timesteps` (float32 where that is an integer type); the angles are
    computed in float32 or better. Raises ValueError for another shape, complex times, a smaller dim or period.

    Vaswani et al. 2017, section 3.5, with the frequencies' ends as in Ho et al. 2020 (the exponent reaches 1).
    """
    if timesteps.ndim != 1 or timesteps.is_complex() or dim < 2 or not 1 <= max_period < math.inf:
        raise ValueError(
            f"need real timesteps of shape (n,), dim >= 2 and a finite max_period >= 1, "
            f"got {timesteps.dtype} of shape {tuple(timesteps.shape)}, {dim} and {max_period}"
        )
    dtype = timesteps.dtype if timesteps.is_floating_point() else torch.float32
    precise = torch.float64 if dtype == torch.float64 else torch.float32  # float16 knows angles near 1000 only to 0.5
    exponents = -math.log(max_period) * torch.linspace(0, 1, dim // 2, dtype=precise, device=timesteps.device)
    angles = timesteps.to(precise)[:, None] * exponents.exp()  # n, dim / 2
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, dim % 2)).to(dtype)  # n, dim


COLUMNS = 64  # as many as the small U-Net of lesson 3 has


def distances(rows, origin):
    """How far each row is from row `origin`, if the last is 1 away from the first: `(n, columns)` -> `(n,)`."""
    return (rows - rows[origin]).norm(dim=1) / (rows[-1] - rows[0]).norm()


def show_why(out):
    t = torch.arange(1001.0)
    raw = distances(t[:, None], origin=370)
    embedded = distances(timestep_embedding(t, COLUMNS), origin=370)

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), sharey=True)
    for axis in axes:
        axis.plot(t, embedded, color="black", label=f"embedded in {COLUMNS} columns")
        axis.plot(t, raw, color="tab:orange", linestyle="--", label="as one number")
        axis.set(xlabel="t", ylim=(0, 1.2))
    axes[0].set(title="The whole range", ylabel="distance from t = 370\n(first to last = 1)", xlim=(0, 1000))
    axes[1].set(title="Near 370", xlim=(345, 395))
    for distance in (raw, embedded):
        axes[1].plot(380, distance[380], "o", color="black", markerfacecolor="white")
        axes[1].annotate(f"{distance[380]:.2f}", (380, distance[380]), (380, distance[380] + 0.06), ha="center")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"Once embedded, 380 is {embedded[380] / raw[380]:.0f} times as far from 370")
    save_picture(figure, out / "1_why.png")
    return {
        "from 370 to 380, if 0 to 1000 is 1: as one number": f"{raw[380]:.3f}",
        f"from 370 to 380, if 0 to 1000 is 1: in {COLUMNS} columns": f"{embedded[380]:.3f}",
    }


if __name__ == "__main__":
    numbers |= show_why(out)


# %% 2. Step by step
# The function once more, without its checks, at the lecture's size: 100 times, 16 columns.
def embed_in_steps(t, dim, max_period=10_000):
    """The exponents `(dim / 2,)`, the angles `(n, dim / 2)` and the embedding `(n, dim)` of the times `(n,)`."""
    # Evenly spaced exponents: each hand is slower than the one before it by one and the same factor.
    exponents = -math.log(max_period) * torch.linspace(0, 1, dim // 2)
    frequencies = exponents.exp()  # from 1 down to 1 / max_period
    # One row for each time, one column for each hand: how far it has turned by then.
    angles = t[:, None] * frequencies
    # Angles grow without end, but a hand that has gone all the way round is back. Sine and cosine say where it is; one
    # alone would not, it takes each value twice on the way round.
    return exponents, angles, torch.cat([angles.sin(), angles.cos()], dim=1)


def show_steps(out):
    t = torch.arange(100.0)
    exponents, angles, matrix = embed_in_steps(t, dim=16)
    print("exponents:        ", *(f"{exponent:z7.3f}" for exponent in exponents))
    print("angles at t = 50: ", *(f"{angle:7.3f}" for angle in angles[50]))
    print("matrix:           ", *matrix.shape)

    figure, axes = plt.subplot_mosaic(
        [["exponents", "waves"], ["angles", "matrix"]], figsize=(8, 6.4), width_ratios=[2, 3]
    )
    hands = range(8)
    axes["exponents"].plot(hands, exponents, "ko:")
    axes["exponents"].set(title="Evenly spaced exponents", xlabel="hand", ylabel="exponent", xticks=hands)
    axes["angles"].semilogy(hands, angles[50], "ko:")
    axes["angles"].axhline(2 * math.pi, color="0.5", linestyle="--")
    axes["angles"].text(7, 2 * math.pi * 1.2, "one turn", ha="right")
    axes["angles"].set(title="Angles at t = 50", xlabel="hand", ylabel="angle (radians)", xticks=hands)
    for column, values in enumerate(matrix.T):
        axes["waves"].plot(t, column - 0.45 * values, color="black" if column < 8 else "0.55")
    axes["waves"].set(title="Each column is a wave", xlim=(0, 99), ylim=(15.6, -0.6))
    image = axes["matrix"].imshow(matrix.T.numpy(), aspect="auto", vmin=-1, vmax=1, interpolation="nearest")
    axes["matrix"].set(title="The 100 × 16 matrix, lying on its side")
    for axis in (axes["waves"], axes["matrix"]):
        axis.set(xlabel="t", ylabel="column (0-7 sine, 8-15 cosine)", yticks=range(0, 16, 2))
    figure.colorbar(image, ax=axes["matrix"])
    figure.suptitle("Fast columns tell neighbouring times apart, slow ones distant times")
    save_picture(figure, out / "2_steps.png")
    difference = (matrix - timestep_embedding(t, 16)).abs().max()
    return {"step by step or by timestep_embedding, largest difference": f"{difference:.1g}"}


if __name__ == "__main__":
    numbers |= show_steps(out)


# %% 3. max_period, and columns that stand still
# `max_period` says how slow the slowest hand is. If it's small for the range of t, even that hand goes round again and
# again: none tells morning from evening, and distant times look no farther apart than near ones. If it's large, the
# slow hands hardly leave their place, and their columns say nothing. So `max_period` must fit the range of t. The
# lecture leaves it at 10000, which was made for t = 0, 1, ..., 999; but its notebook 28 puts in t from 0 to 1, and its
# notebook 26 the noise level sigma as it is.
TIME_SCALE = 1000
LOG_SIGMA = (-1.2, 1.2)  # mean and standard deviation of ln(sigma) in training (Karras et al. 2022, table 1)
SIGMA_RANGE = (0.01, 80.0)  # in sampling


def noise_to_time(sigma):
    """What lesson 3 embeds: ln(sigma) / 4 (Karras et al. 2022, table 1), times a constant that makes the hands move."""
    return TIME_SCALE * sigma.log() / 4


RANGES = {
    "notebook 28, t from 0 to 1": torch.tensor([0.0, 1.0]),
    "notebook 26, sigma in sampling": torch.tensor(SIGMA_RANGE),
    "notebook 26, sigma in 95 % of training": (LOG_SIGMA[0] + LOG_SIGMA[1] * torch.tensor([-1.96, 1.96])).exp(),
    "lesson 3, 1000 ln(sigma) / 4": noise_to_time(torch.tensor(SIGMA_RANGE)),
}


def swings(columns):
    """How far each column moves, from its smallest to its largest value: `(n, dim)` -> `(dim,)`."""
    return columns.amax(dim=0) - columns.amin(dim=0)


def count_still(columns, full_swing=2.0):
    """How many columns of `(n, dim)` move by less than 1 % of a full swing, which for a sine is from -1 to 1."""
    return int((swings(columns) < 0.01 * full_swing).sum())


def count_directions(columns):
    """How many directions hold 99 % of what varies in `(n, dim)`: columns that are copies of one another count once."""
    spread = torch.linalg.svdvals(columns - columns.mean(dim=0)) ** 2
    return int((spread.cumsum(dim=0) < 0.99 * spread.sum()).sum()) + 1


def near_to_far(max_period):
    """How far apart times 10 to 100 apart are once embedded, on average, if times 400 to 600 apart are 1 apart."""
    embedding = timestep_embedding(torch.arange(601.0), COLUMNS, max_period)
    far_from_first = (embedding - embedding[0]).norm(dim=1)
    return float(far_from_first[10:101].mean() / far_from_first[400:].mean())


# The lecture puts a batch norm behind the embedding, which brings each column to mean 0 and standard deviation 1. That
# rescues a column that moves little. It can't rescue one that moves less than the norm's eps lets it see (1e-5, added
# to the variance) or than float32 can write next to a 1. Nor can it make columns differ: on a short range every slow
# sine is the same straight line and every slow cosine the same parabola, however far they are stretched. The last
# count below, of the directions that remain, shows it.
#
# Lesson 3 pays a price at the other end: its fastest hands go round more than once between two steps of a sampler, and
# say nothing either. A network has to learn to pass over them, as the one in section 6 does.
def show_periods(out):
    rows = [["10", "10", "1000", "1000", "10000", "10000"], ["sines"] * 3 + ["cosines"] * 3]
    figure, axes = plt.subplot_mosaic(rows, figsize=(8, 7), height_ratios=[3, 4])
    for max_period in (10, 1000, 10_000):
        matrix = timestep_embedding(torch.arange(100.0), 16, max_period)
        axis = axes[str(max_period)]
        image = axis.imshow(matrix.T.numpy(), aspect="auto", vmin=-1, vmax=1, interpolation="nearest")
        axis.set(xlabel="t", ylabel="column", yticks=range(0, 16, 5))
        axis.set_title(f"max_period {max_period}:\n{count_still(matrix)} of 16 stand still")
        turn, ratio = 2 * math.pi * max_period, near_to_far(max_period)
        print(f"max_period {max_period:5}: slowest turn {turn:5.0f}, near times {ratio:.2f} as far apart as far ones")
    figure.colorbar(image, ax=axis)

    numbers = {}
    styles = [("black", "-"), ("0.5", "-"), ("0.5", ":"), ("tab:orange", "--")]
    print(f"{f'columns that stand still, of {COLUMNS}':40}{'as they are':>12}{'normed':>10}{'directions':>14}")
    for (name, (low, high)), (color, linestyle) in zip(RANGES.items(), styles, strict=True):
        columns = timestep_embedding(torch.linspace(low, high, 2001), COLUMNS)
        normed = F.batch_norm(columns, None, None, training=True)
        still = count_still(columns)
        still_normed = count_still(normed, full_swing=2 * math.sqrt(2))  # a sine has standard deviation 1 / sqrt(2)
        print(f"{name:40}{still:12}{still_normed:10}{count_directions(normed):14}")
        numbers[f"columns of {COLUMNS} that stand still: {name}"] = still
        for half, movement in zip(("sines", "cosines"), swings(columns).chunk(2), strict=True):
            axes[half].semilogy(movement, color=color, linestyle=linestyle, label=f"{name}: {still}")
    for half in ("sines", "cosines"):
        axes[half].axhspan(3e-8, 0.02, color="0.92")
        axes[half].set(title=f"{COLUMNS // 2} {half}, max_period 10000", xlabel="hand", xlim=(0, 31), ylim=(3e-8, 4))
    axes["sines"].set(ylabel="movement over the range\n(grey: stands still)")
    legend_title = f"how many of the {COLUMNS} stand still"
    figure.legend(*axes["sines"].get_legend_handles_labels(), title=legend_title, loc="outside lower center", ncols=2)
    figure.suptitle("max_period too small for the range of t: no slow columns; too large: columns stand still")
    save_picture(figure, out / "3_max_period.png")
    return numbers


if __name__ == "__main__":
    numbers |= show_periods(out)


# %% 4. What a network can do with it
# "3 later" turns each hand by an angle of its own, whatever the time is. And turning is linear: sin(a + b) and
# cos(a + b) are sums of sin(a) and cos(a), with weights that depend on b alone. So it's one matrix for all times, and a
# single linear layer can learn it.
def rotation(shift, dim, max_period=10_000):
    """The `(dim, dim)` float64 matrix R with `embedding(t + shift) = R @ embedding(t)` for every t.

    Raises ValueError for an odd dim. Vaswani et al. 2017, section 3.5, choose the sines for this.
    """
    if dim % 2:
        raise ValueError(f"need an even dim, got {dim}: a column of zeros has no angle")
    sines, cosines = timestep_embedding(torch.tensor([shift], dtype=torch.float64), dim, max_period)[0].chunk(2)
    to_sines = torch.cat([cosines.diag(), sines.diag()], dim=1)  # sin(a + b) = cos(b) sin(a) + sin(b) cos(a)
    to_cosines = torch.cat([-sines.diag(), cosines.diag()], dim=1)  # cos(a + b) = -sin(b) sin(a) + cos(b) cos(a)
    return torch.cat([to_sines, to_cosines])


def draw_dials(axis, times, shift):
    """A row of clock faces for each time: a hand at that time (grey), `shift` later (black), and the turn between."""
    hands = range(0, 16, 2)
    embeddings = timestep_embedding(torch.tensor([shift, *times, *(t + shift for t in times)]), COLUMNS)
    sines, cosines = embeddings.chunk(2, dim=1)
    degrees = torch.rad2deg(torch.atan2(sines, cosines)).tolist()
    for row in range(len(times)):
        before, after = 1 + row, 1 + row + len(times)
        for place, hand in enumerate(hands):
            x, y = 2.4 * place, -2.4 * row
            axis.add_patch(Circle((x, y), 1, fill=False, color="0.7"))
            # Clock hands start upwards and turn to the right, so the sine is x and the cosine y.
            start = 90 - degrees[before][hand]
            axis.add_patch(Wedge((x, y), 0.6, start - degrees[0][hand], start, color="tab:orange", alpha=0.8))
            for time, color in ((before, "0.6"), (after, "black")):
                axis.plot([x, x + sines[time, hand]], [y, y + cosines[time, hand]], color=color, linewidth=2)
    axis.set(aspect="equal", xlabel="hand", xticks=[2.4 * place for place in range(len(hands))], xticklabels=hands)
    axis.set(yticks=[-2.4 * row for row in range(len(times))], yticklabels=[f"t = {t} to {t + shift}" for t in times])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


# A rotation changes neither lengths nor angles. So the dot product of two embeddings can't depend on when they are, but
# only on how far apart: it's the sum of cos(frequency * distance). Attention, in lesson 2, is made of dot products.
def show_geometry(out):
    t, shift = torch.arange(100, dtype=torch.float64), 3
    embedding = timestep_embedding(t, COLUMNS)
    dots = embedding @ embedding.T  # 100 100
    by_distance = dots[0]  # 0 and t are t apart
    dot_error = (dots - by_distance[(t[:, None] - t).abs().long()]).abs().max()
    turn_error = (embedding[:-shift] @ rotation(shift, COLUMNS).T - embedding[shift:]).abs().max()

    figure, axes = plt.subplot_mosaic([["matrix", "curve"], ["dials"] * 2], figsize=(8, 6.4), height_ratios=[3, 2])
    image = axes["matrix"].imshow(dots.numpy())
    axes["matrix"].set(title="Dot products: the same\nalong each diagonal", xlabel="time", ylabel="another time")
    figure.colorbar(image, ax=axes["matrix"])
    axes["curve"].plot(t, by_distance, color="black", linewidth=4, label="times 0 and d")
    axes["curve"].plot(t[:50], dots[50, 50:], color="white", linestyle="--", label="times 50 and 50 + d")
    axes["curve"].set(title="One curve for all times", xlabel="distance d", ylabel="dot product", xlim=(0, 99))
    axes["curve"].legend(facecolor="0.8")
    draw_dials(axes["dials"], times=(20, 31), shift=shift)
    axes["dials"].set(title=f"{shift} later turns each hand by an angle of its own, whatever the time")
    save_picture(figure, out / "4_geometry.png")
    return {
        "dot product and its value for that distance, largest difference": f"{dot_error:.0e}",
        f"embedding(t + {shift}) and rotation({shift}) @ embedding(t), largest difference": f"{turn_error:.0e}",
    }


if __name__ == "__main__":
    numbers |= show_geometry(out)


# %% 5. A residual block that knows the time
# The embedding is one vector for a whole image, while a convolution works on pixels. So a linear layer turns the vector
# into two numbers for each channel, the same for all its pixels: a scale and a shift. They come after the second norm,
# because a norm would take out again what they do to all of its group alike.
class TimeBlock(nn.Module):
    """Two convolutions and a shortcut; scale and shift behind the second norm come from the embedding.

    channels: of the activations. dim: columns of the embedding. groups: of both norms, divides channels.

    The block of Ho et al. 2020 with the scale and shift of Dhariwal and Nichol 2021, section 3.1.
    """

    def __init__(self, channels, dim, groups=1):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(dim, 2 * channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, embedding):
        """x and the result: `(n, channels, h, w)`, embedding: `(n, dim)`."""
        scale, shift = self.scale_shift(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)  # n c 1 1, each
        hidden = self.conv1(F.silu(self.norm1(x)))  # n c h w
        hidden = (1 + scale) * self.norm2(hidden) + shift  # 1 + : a layer that says nothing, 0, changes nothing
        return x + self.conv2(F.silu(hidden))


# One input at many times. In a fresh block time does little; this one's weights are drawn larger, so that it shows.
def show_block(out):
    torch.manual_seed(0)
    block = TimeBlock(channels=8, dim=16)
    nn.init.normal_(block.scale_shift.weight, std=0.5)
    x = 0.3 * F.interpolate(torch.randn(1, 8, 4, 4), size=(16, 16), mode="bicubic")  # smooth blobs
    t = torch.linspace(0, 40, 161)
    embedding = timestep_embedding(t, 16)
    with torch.no_grad():
        scale, shift = block.scale_shift(F.silu(embedding)).chunk(2, dim=1)  # 161 8, each
        y = block(x.expand(len(t), -1, -1, -1), embedding)  # 161 8 16 16
    moved = (y - y[0]).flatten(1).norm(dim=1) / (y[0] - x[0]).norm()

    channel, row, column = 0, 6, 4
    shown = range(0, 161, 40)
    figure, axes = plt.subplot_mosaic([[str(i) for i in shown], ["curves"] * 5], figsize=(8, 5.4), height_ratios=[2, 3])
    for i in shown:
        axes[str(i)].imshow(y[i, channel].numpy(), vmin=float(y[:, channel].min()), vmax=float(y[:, channel].max()))
        axes[str(i)].plot(column, row, "ks", markeredgecolor="white")
        axes[str(i)].set(title=f"output at\nt = {t[i]:.0f}", xticks=[], yticks=[])
    axes["curves"].plot(t, scale[:, channel], color="0.6", label="scale of a channel")
    axes["curves"].plot(t, shift[:, channel], color="tab:orange", linestyle="--", label="its shift")
    axes["curves"].plot(t, y[:, channel, row, column], color="black", label="output at the marked pixel")
    axes["curves"].set(xlabel="t", ylabel="value", xlim=(0, 40))
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle("One block, one input: the output moves with t")
    save_picture(figure, out / "5_block.png")
    return {"same input, other t: what the block adds moves, of its size, up to": f"{moved.max():.2f}"}


if __name__ == "__main__":
    numbers |= show_block(out)


# %% 6. Does time help?
# The smallest case in which one can ask: an "image" of one pixel, which is near -1 or near 1. Noise of some level sigma
# is added, and a network is to say what the pixel was: once with a clock that shows sigma, once with a stopped clock.
# Here the best possible answer is known, so we see not only which is better but also how much either leaves to be won.
PEAKS = torch.tensor([-1.0, 1.0], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)  # how many pixels are near each peak
PEAK_WIDTH = 0.1  # standard deviation


def draw_pixels(n):
    """Clean pixels, the same with noise, and the noise levels: three times `(n,)`, float32."""
    peaks = PEAKS[torch.multinomial(SHARES, n, replacement=True)].float()
    clean = peaks + PEAK_WIDTH * torch.randn(n)
    sigma = (LOG_SIGMA[0] + LOG_SIGMA[1] * torch.randn(n)).exp()
    return clean, clean + sigma * torch.randn(n), sigma


# Noise makes each Gaussian peak a wider Gaussian. How likely x is to have come from one peak or the other is Bayes'
# rule; if it came from this one, the best guess at what it was lies between x and the peak.
def log_densities(x, sigma):
    """The logarithm of each peak's part in the density of noisy pixels at x; x and sigma broadcast: `(..., 2)`."""
    variance = (PEAK_WIDTH**2 + sigma**2)[..., None]
    return SHARES.log() - (x[..., None] - PEAKS) ** 2 / (2 * variance) - (2 * math.pi * variance).log() / 2


def ideal_denoiser(x, sigma):
    """The mean of the clean pixels that may have become x: no other estimate has so small a squared error."""
    weights = log_densities(x, sigma).softmax(dim=-1)  # ... 2
    peak, noise = PEAK_WIDTH**2, sigma[..., None] ** 2  # variances: the wider the noise, the nearer to the peak
    return (weights * (peak * x[..., None] + noise * PEAKS) / (peak + noise)).sum(dim=-1)


def noise_levels():
    """Noise levels that stand for all those of training, and how likely each is: `(101,)`, `(101,)`."""
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    return (LOG_SIGMA[0] + LOG_SIGMA[1] * z).exp(), (-(z**2) / 2).softmax(dim=0)


def ideal_blind_denoiser(x, sigma=None):
    """The best estimate from x alone: the ideal ones of all levels, by how likely it is that the level made this x."""
    levels, chances = noise_levels()
    weights = chances * log_densities(x[..., None], levels).exp().sum(dim=-1)  # ... 101
    return (weights * ideal_denoiser(x[..., None], levels)).sum(dim=-1) / weights.sum(dim=-1)


def expected_loss(denoise):
    """The mean squared error of `denoise(x, sigma)` over all pixels, levels and noise; a sum over a grid, no chance."""
    levels, chances = noise_levels()
    u = torch.linspace(-9.5, 9.5, 1001, dtype=torch.float64)
    x, dx = u.sinh() / 10, u.cosh() / 10 * (u[1] - u[0])  # a fine grid at the peaks, a coarse one out to the far noise
    levels = levels[:, None]
    probabilities = chances[:, None] * log_densities(x, levels).exp().sum(dim=-1) * dx  # 101 1001
    ideal = ideal_denoiser(x, levels)
    # No estimate avoids this: the clean pixels' mean square less the ideal's. Its distance from the ideal comes on top.
    unavoidable = (SHARES * PEAKS**2).sum() + PEAK_WIDTH**2 - (probabilities * ideal**2).sum()
    with torch.no_grad():
        return float(unavoidable + (probabilities * (denoise(x, levels) - ideal) ** 2).sum())


class TinyDenoiser(nn.Module):
    """Three layers, and the time's scale and shift as in section 5. If the clock has stopped, the time is always 0."""

    def __init__(self, clock_runs, width=64):
        super().__init__()
        self.clock_runs = clock_runs
        self.first = nn.Linear(1, width)
        self.scale_shift = nn.Linear(COLUMNS, 2 * width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)

    def forward(self, x, sigma):
        """Noisy pixels and noise levels, of shapes that broadcast -> estimates of the clean pixels."""
        x, sigma = torch.broadcast_tensors(x.float(), sigma.float())
        time = noise_to_time(sigma.flatten()) * self.clock_runs
        scale, shift = self.scale_shift(timestep_embedding(time, COLUMNS)).chunk(2, dim=1)  # n width, each
        hidden = (1 + scale) * self.first(x.reshape(-1, 1)) + shift  # n width
        hidden = self.second(F.silu(hidden))  # n width
        return self.last(F.silu(hidden)).reshape(x.shape)


def train(clock_runs, steps=800, seed=0):
    """A trained TinyDenoiser. With either clock it starts from the same weights and sees the same pixels and noise."""
    torch.manual_seed(seed)
    network = TinyDenoiser(clock_runs)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.008 * (1 - step / steps)
        clean, noisy, sigma = draw_pixels(512)
        loss = F.mse_loss(network(noisy, sigma), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


# The stopped clock's network ends near the best that any function of x alone can do. So it lacks neither size nor
# training: it lacks the time, and makes one curve do for all levels. The other one follows the ideal wherever noisy
# pixels are; where there are hardly any, near 0 at sigma = 0.2, nothing teaches it.
#
# An image of many pixels shows by itself how noisy it is, and one pixel can't. So time is worth less to a U-Net.
def show_denoisers(out):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that share work as small as this mostly wait for each other
    running, stopped = train(clock_runs=True), train(clock_runs=False)
    losses = {
        "best possible": expected_loss(ideal_denoiser),
        "network with a clock": expected_loss(running),
        "network with a stopped clock": expected_loss(stopped),
        "best possible with a stopped clock": expected_loss(ideal_blind_denoiser),
    }
    torch.set_num_threads(threads)

    figure, axes = plt.subplots(1, 3, figsize=(8, 4.2), sharey=True)
    for axis, level in zip(axes, (0.2, 0.6, 2.0), strict=True):
        x = torch.linspace(-1.2 - 2 * level, 1.2 + 2 * level, 400, dtype=torch.float64)
        sigma = torch.tensor(level, dtype=torch.float64)
        density = log_densities(x, sigma).exp().sum(dim=-1)
        axis.fill_between(x, -1.4, -1.4 + 0.8 * density / density.max(), color="0.9", label="how common x is")
        with torch.no_grad():
            axis.plot(x, ideal_denoiser(x, sigma), color="0.7", linewidth=5, label="best possible")
            axis.plot(x, running(x, sigma), color="black", label="with a clock")
            axis.plot(x, stopped(x, sigma), color="tab:orange", linestyle="--", label="with a stopped clock")
        axis.set(title=f"sigma = {level}", xlabel="noisy pixel x", xlim=(float(x[0]), float(x[-1])), ylim=(-1.4, 1.4))
    axes[0].set(ylabel="estimate of the clean pixel")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    best, with_clock, without, _ = losses.values()
    figure.suptitle(f"Loss {with_clock:.3f} with a clock, {without:.3f} with a stopped one; best possible {best:.3f}")
    save_picture(figure, out / "6_denoisers.png")
    return {f"loss, {name}": f"{loss:.4f}" for name, loss in losses.items()}


if __name__ == "__main__":
    numbers |= show_denoisers(out)


# %% The numbers
if __name__ == "__main__":
    print()
    for name, number in numbers.items():
        print(f"{name:80} {number:>8}")


# %% Not for this lesson: what lessons 3 and 4 share
class NotTrained(Exception):
    """A section needs a network that a run of the script has trained; the message is one line that says how."""


class Lesson:
    """A script's `show_…(out)` functions, in order: @lesson adds one. --show runs them all; where cells are run one by
    one in an editor (in_main, and the command line isn't the script's), each runs at once.

    options: --out, --data, --data-dir and --device of the command line, as far as sections depend on them.
    """

    def __init__(self, script, in_main):
        parser = Parser(script, None)
        self.script = script
        self.in_cells = in_main and Path(sys.argv[0]).resolve().name != script
        self.options = argparse.Namespace(out=parser.get_default("out"), data="auto", data_dir=None, device="auto")
        self.shows = []

    def __call__(self, show):
        self.shows.append(show)
        if self.in_cells:
            self.run(show)
        return show

    def run(self, show):
        """Print and draw what a section says; its pictures go to lesson/ in the folder of the run."""
        out = self.options.out / "lesson"
        out.mkdir(parents=True, exist_ok=True)
        print(f"\n{show.__doc__}")
        try:
            show(out)
        except NotTrained as reason:
            print(f"   left out: {reason}")


def plot_lines(axes, x, lines, **labels):
    """Up to three curves over x, by name, that differ without colour too; `labels` is what `axes.set` takes."""
    styles = [("black", "-"), ("tab:orange", "--"), ("0.5", "-.")][: len(lines)]
    for (name, y), (color, line) in zip(lines.items(), styles, strict=True):
        axes.plot(x, y, line, color=color, marker="o" if len(x) < 25 else None, label=name)
    axes.set(**labels)
    axes.legend()


def grid(images, columns):
    """`(n, 1, h, w)` in [-1, 1] -> one picture `(rows h, columns w)`, row by row; what is missing is background."""
    missing = -len(images) % columns
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing), value=-1)
    return rearrange(images, "(rows columns) 1 h w -> (rows h) (columns w)", columns=columns)


def plot_images(axes, images, columns, rows=(), heads=()):
    """Images `(n, 1, h, w)` in [-1, 1] in a grid, with a name for each row and each column if given."""
    height, width = images.shape[2:]
    axes.imshow(grid(images, columns).numpy(), vmin=-1, vmax=1)
    axes.set_xticks([(column + 0.5) * width - 0.5 for column in range(len(heads))], heads)
    axes.set_yticks([(row + 0.5) * height - 0.5 for row in range(len(rows))], rows)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def save_images(path, title, images, columns, rows=(), heads=()):
    """A picture of such a grid alone."""
    scale = min(12, max(4, 0.8 * columns)) / columns  # inches an image
    width, height = scale * columns + 1.5 * bool(rows), scale * math.ceil(len(images) / columns) + 0.6
    figure, axes = plt.subplots(figsize=(max(7, width), height + 0.3 * bool(heads)))
    plot_images(axes, images, columns, rows, heads)
    figure.suptitle(title)
    save_picture(figure, path)
