"""Lesson 1: a number becomes a vector.

A diffusion network does better if it knows how noisy its input is. The bare step number is a poor input, because
neighbouring steps are nearly the same number. A vector of sines and cosines, fast and slow, keeps neighbours apart and
still tells early from late (Vaswani et al. 2017, section 3.5; lecture section "time embedding").

    python 01_time_embedding.py [--out DIR]
"""

import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import lesson_tools as tools


# %% 1. A clock
# One diffusion network removes noise at every level, and what it must do depends on the level. So it gets a time step,
# from 0 to 999 (Ho et al. 2020; section 12 of 03 shows what other networks get). With pixels from -1 to 1, the noise
# has a standard deviation of 0.010 at step 0 and of 0.047 at step 10. Both are nearly invisible, yet the network must
# output that noise scaled up to standard deviation 1: a hundredfold at step 0, but only twentyfold at step 10.
#
# As a single number, though, 10 is almost 0: it lies a hundredth of the way from the first step to the last. To treat
# the two so differently, a network needs very large weights, which it learns slowly (Tancik et al. 2020).
#
# Clocks solved this long ago. The second hand tells neighbouring moments apart, the hour hand tells three from nine,
# and no hand ever leaves the dial. The embedding is a clock: at time t, each hand has turned through an angle of t
# times its frequency (in radians, so a full turn takes 2π / frequency). Each hand is slower than the one before it by a
# constant factor: the frequencies are powers of one number, with evenly spaced exponents.
#
# (Not every network needs a clock. The one in 03 must scale up faint noise nearly as much. It has a clock, but
# reaches as low a loss with a single number, ln(sigma), perhaps because a logarithm spaces the noise levels well
# (docs/open_questions.md).)
@tools.section
def show_clock():
    times = torch.tensor([50.0, 51.0, 900.0])
    angles = times[:, None] * 10_000 ** -torch.linspace(0, 1, 8)  # 3 8: a row for each time, a column for each hand
    figure, axes = plt.subplots(3, 8, figsize=(8, 3.3), subplot_kw={"projection": "polar"})
    for axis, angle in zip(axes.flat, angles.flatten().tolist(), strict=True):
        axis.plot([angle, angle], [0, 1], color="black", linewidth=2)
        axis.set(theta_offset=math.pi / 2, theta_direction=-1, xticks=[], yticks=[], ylim=(0, 1))
    for axis, time in zip(axes[:, 0], times, strict=True):
        axis.set_ylabel(f"t = {time:.0f}", labelpad=18)
    figure.suptitle("Fast hands tell 50 from 51, slow hands 50 from 900")
    return figure


# %% 2. Step by step
# The angle grows without end, but after a full turn the hand is back where it was. Its sine and cosine together say
# where it points. Neither is enough alone: each takes nearly every value twice in a turn.
def timestep_embedding(timesteps, dim, max_period=10_000):
    """Sines and cosines of each time, at `dim // 2` frequencies from 1 down to `1 / max_period`.

    timesteps: `(n,)`. dim: at least 2; if it is odd, the last column is all zeros. max_period: at least 1. Returns
    `(n, dim)`, sines first, in the dtype of `timesteps` (float32 for integers). Raises ValueError for other shapes and
    ranges. (Vaswani et al. 2017, section 3.5; ending exactly at 1 / max_period follows Ho et al. 2020.)
    """
    if timesteps.ndim != 1 or dim < 2 or not 1 <= max_period < math.inf:
        got = f"shape {tuple(timesteps.shape)}, {dim} and {max_period}"
        raise ValueError(f"need timesteps of shape (n,), dim >= 2 and a finite max_period >= 1, got {got}")
    dtype = timesteps.dtype if timesteps.is_floating_point() else torch.float32
    t = timesteps.to(torch.promote_types(dtype, torch.float32))  # in bfloat16, an angle near 1000 is off by up to 2
    exponents = torch.linspace(0, 1, dim // 2, dtype=t.dtype, device=t.device)  # dim/2, evenly spaced
    frequencies = max_period**-exponents  # dim/2; the lecture's exp(-log(max_period) * exponents) is the same
    angles = t[:, None] * frequencies  # n dim/2: one row for each time, one column for each hand
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)  # n dim
    return F.pad(embedding, (0, dim % 2)).to(dtype)


# The lecture's example: t = 0, 1, ..., 99, in 16 columns.
@tools.section
def show_steps():
    t, exponents = torch.arange(100.0), torch.linspace(0, 1, 8)
    matrix = timestep_embedding(t, 16)  # 100 16
    frequencies = 10_000**-exponents
    for name, row in {"exponents": exponents, "frequencies": frequencies, "angles, t = 50": 50 * frequencies}.items():
        print(f"   {name:14}", *(f"{value:8.4f}" for value in row))
    print(f"   matrix {tuple(matrix.shape)}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8), sharey=True)
    left.plot(t, torch.arange(16) - 0.45 * matrix, color="black")  # minus: the shared axis points down
    right.imshow(matrix.T.numpy(), aspect="auto")
    left.set(title="Each column is a wave", xlabel="t", ylabel="column")
    right.set(title="The 100 × 16 matrix, lying on its side", xlabel="t")
    figure.suptitle("Sines (0 to 7) and cosines (8 to 15), ordered from fast to slow")
    return figure


# %% 3. What the clock buys, and what it costs
# Fast hands keep nearby times apart: once embedded, 370 and 380 are two thirds as far apart as 0 and 1000. The price:
# distant times lose their order. From 370, the embedding of 500 is even farther away than that of 0, although as a
# number 0 is almost three times as far away. The slow hands know better, but the network must learn to trust them.
def distances(rows, origin):
    """How far each row is from row `origin`, in units of the distance from first to last: `(n, columns)` -> `(n,)`."""
    return (rows - rows[origin]).norm(dim=1) / (rows[-1] - rows[0]).norm()


@tools.section
def show_distances():
    t = torch.arange(1001.0)
    lines = {"as one number": distances(t[:, None], 370), "as 64 columns": distances(timestep_embedding(t, 64), 370)}
    for name, distance in lines.items():
        print(f"   {name}, from 370: " + ", ".join(f"{time} is {distance[time]:.3f}" for time in (371, 380, 500, 0)))
    ratio = lines["as 64 columns"][380] / lines["as one number"][380]
    subtitle = f"370 to 380 is {ratio:.0f} times as far as on the number line; 500 is farther away than 0"
    title = f"The embedding separates nearby times and mixes up distant ones\n{subtitle}"
    return tools.plot_curves(title, t, lines, xlabel="t", ylabel="distance from t = 370\n(first to last: 1)")


# %% 4. max_period must fit the range of t
# max_period sets the speed of the slowest hand, which takes 2π · max_period for a full turn. If max_period is too small
# for the range of t, even this hand goes round more than once, and no single hand tells early from late. All hands
# together still do, but in a tangled way: a linear layer can't read t from 16 such columns (R² below; 1 is perfect).
#
# If it is too large, the slow hands hardly move: their columns barely vary, and a network needs large weights to use
# them. Rule of thumb: make max_period about as large as the range of t.
#
# The default, 10000, was chosen for the positions of words in a text (Vaswani et al. 2017); diffusion models kept it
# for t = 0, 1, ..., 999. The lecture keeps it too, although its conditional model (notebook 28) feeds in t from 0 to 1,
# so most columns barely vary. The lecture calls another value "worth an experiment", but doesn't run one.
def linear_fit(matrix, t):
    """R² of the best linear prediction of t `(n,)` from the columns of matrix `(n, columns)`; 1 is perfect."""
    columns = torch.cat([matrix, torch.ones(len(t), 1)], dim=1).double()  # and a constant
    rest = t - columns @ torch.linalg.lstsq(columns, t[:, None].double(), driver="gelsd").solution[:, 0]
    return float(1 - rest.var() / t.var())


@tools.section
def show_max_period():
    figure, axes = plt.subplots(1, 4, figsize=(8, 3), sharey=True)
    for axis, (last, max_period) in zip(axes, ((99, 10), (99, 100), (99, 10_000), (1, 10_000)), strict=True):
        t = torch.linspace(0, last, 100)
        matrix = timestep_embedding(t, 16, max_period)
        axis.imshow(matrix.T.numpy(), aspect="auto", vmin=-1, vmax=1, extent=(0, last, 15.5, -0.5))
        still = int((matrix.amax(dim=0) - matrix.amin(dim=0) < 0.02).sum())  # less than 1 % of a swing from -1 to 1
        print(f"   t from 0 to {last}, max_period {max_period}: {still} of 16 columns barely vary;", end=" ")
        print(f"a linear layer reads t with R² {linear_fit(matrix, t):.2f}")
        axis.set(xlabel="t", title=f"max_period {max_period}:\n{still} of 16 flat")
    axes[0].set_ylabel("column")
    figure.suptitle("max_period too small: no slow columns; too large: flat ones")
    return figure


# %% 5. An aside: "3 later" is a rotation
# The U-Net of 03 doesn't use this, but it is why the first transformer encoded positions as sines (Vaswani et al. 2017,
# section 3.5). Adding 3 to t turns each hand by a fixed angle of its own, whatever t is. Turning is linear: sin(a + b)
# and cos(a + b) are weighted sums of sin(a) and cos(a), with weights that depend on b alone. So one matrix serves all
# times, and a single linear layer can learn it. Turning two embeddings by the same angles changes neither their lengths
# nor the angle between them. So their dot product depends only on how far apart the times are, not on the times
# themselves: it is the sum of cos(frequency * distance).
def shift_matrix(shift, dim, max_period=10_000):
    """The `(dim, dim)` float64 matrix R with `embedding(t + shift) = R @ embedding(t)` for every t, if dim is even."""
    sines, cosines = timestep_embedding(torch.tensor([shift], dtype=torch.float64), dim, max_period)[0].chunk(2)
    to_sines = torch.cat([cosines.diag(), sines.diag()], dim=1)  # sin(a + b) = cos(b) sin(a) + sin(b) cos(a)
    to_cosines = torch.cat([-sines.diag(), cosines.diag()], dim=1)  # cos(a + b) = -sin(b) sin(a) + cos(b) cos(a)
    return torch.cat([to_sines, to_cosines])


@tools.section
def show_shift():
    t = torch.arange(100, dtype=torch.float64)
    embedding = timestep_embedding(t, 64)
    error = (embedding[:-3] @ shift_matrix(3, 64).T - embedding[3:]).abs().max()
    dots = embedding @ embedding.T  # 100 100
    print(f"   embedding(t + 3) and shift_matrix(3) @ embedding(t): largest difference {error:.0e}")
    print("   dot products of times 10 apart:", *(f"{dots[i, i + 10]:.6f}" for i in (0, 30, 60)))
    figure, axes = plt.subplots(figsize=(6, 4.2))
    figure.colorbar(axes.imshow(dots.numpy()), ax=axes)
    axes.set(xlabel="t", ylabel="t")
    figure.suptitle("Dot products of all pairs: constant along each diagonal")
    return figure


# %% 6. From the embedding to a layer: scale and shift
# A small network turns the raw sines into useful features. It runs once, and all blocks of the U-Net share its output.
# (The lecture's version begins with batch norm, then an activation. Its norm amplifies columns that barely vary.)
class TimeEmbedding(nn.Module):
    """Times `(n,)` to vectors `(n, 4 * dim)`: sines and cosines in dim columns, then two linear layers."""

    def __init__(self, dim):
        super().__init__()
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, timesteps):
        h = self.linear1(timestep_embedding(timesteps, self.linear1.in_features))
        return self.linear2(F.silu(h))  # SiLU, x · sigmoid(x), is a smooth ReLU


# There is one vector per image, but a convolution works on pixels. So in each block, a linear layer turns the vector
# into a scale and a shift for each channel, the same for all pixels: a channel can be amplified at one time and
# switched off at another. Section 8 of 03 shows where in a residual block this layer goes, and why.
class ScaleShift(nn.Module):
    """Scales and shifts each channel by amounts computed from the embedding (Dhariwal and Nichol 2021, section 3.1)."""

    def __init__(self, embedding_dim, channels):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 2 * channels)

    def forward(self, x, embedding):
        """x and the result: `(n, channels, h, w)`; embedding: `(n, embedding_dim)`."""
        scale, shift = self.linear(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)  # n channels 1 1, each
        return (1 + scale) * x + shift  # scale = shift = 0 leaves x as it is


@tools.section
def show_scale_shift():
    torch.manual_seed(0)
    embed, layer = TimeEmbedding(dim=16), ScaleShift(4 * 16, channels=4)
    nn.init.normal_(layer.linear.weight, std=1.5)  # a new layer changes little; larger weights show the effect
    t = torch.linspace(0, 100, 6)
    x = F.interpolate(torch.randn(1, 4, 4, 4), size=(16, 16), mode="bicubic").expand(6, -1, -1, -1)  # smooth blobs
    with torch.no_grad():
        y = layer(x, embed(t))  # 6 4 16 16
    print(f"   t {tuple(t.shape)} -> embedding {tuple(embed(t).shape)}; x {tuple(x.shape)} -> {tuple(y.shape)}")
    pictures, rows = rearrange(y, "t c h w -> (c t) 1 h w"), [f"channel {channel}" for channel in range(4)]
    title = "The same input, rescaled differently at each time (untrained)"
    return tools.plot_grid(title, pictures / pictures.abs().max(), 6, rows, [f"t = {time:.0f}" for time in t])


# %% The command
def main():
    options = tools.make_parser(__file__, __doc__).parse_args()
    tools.run_sections(globals(), options.out)


if __name__ == "__main__":
    tools.run_command(main)
