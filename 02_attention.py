"""Lesson 2: pixels look at each other.

A convolution sees a neighbourhood. Attention makes each pixel a weighted average of all pixels, with weights that
depend on what the pixels hold (Vaswani et al. 2017; lecture section "self-attention").

    python 02_attention.py [--out DIR]
"""

# %% What this lesson needs
import functools
import importlib
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange
from torch import nn

from data import load

lesson1 = importlib.import_module("01_time_embedding")
Parser = lesson1.Parser
save_picture = lesson1.save_picture


@functools.cache
def load_garments():
    """One test picture of each class, `(classes, 1, 28, 28)` in [-1, 1]; the classes' names; the data set's name."""
    data = load("auto", "test")
    labels, firsts = np.unique(data.labels, return_index=True)
    pictures = torch.from_numpy(data.images[firsts])[:, None] / 127.5 - 1  # n 1 h w
    return F.interpolate(pictures, size=(28, 28)), [data.classes[label] for label in labels], data.name


def plot_image(ax, image, title, **options):
    """An image `(h, w)` under its title."""
    ax.set_title(title, fontsize=10)
    ax.set(xticks=[], yticks=[])
    return ax.imshow(image.numpy(), **options)


def relative_error(result, expected):
    """The largest difference anywhere, in units of the largest expected value."""
    return ((result - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    out = Parser("02_attention.py", __doc__).parse_args().out


# %% 1. An image becomes a sequence
# Attention works on a sequence of tokens, here one for each pixel. The shapes in the comments are written as einops
# writes them: n images, c channels, h rows, w columns; (h w) is one axis, row after row.
def to_tokens(x):
    """Activations `(n, c, h, w)` as one token for each pixel, `(n, h w, c)`."""
    return x.flatten(2).transpose(1, 2)  # n c h w -> n c (h w) -> n (h w) c


def to_image(tokens, height):
    """Back again: `(n, h w, c)` to `(n, c, h, w)`."""
    return tokens.transpose(1, 2).unflatten(2, (height, tokens.shape[1] // height))


def black_box(x):
    """Attention between the pixels of `(n, c, h, w)`, as PyTorch has it. Section 3 opens the box."""
    tokens = to_tokens(x)
    return to_image(F.scaled_dot_product_attention(tokens, tokens, tokens), x.shape[2])


def permute_pixels(x, order):
    """Pixel i of the result is pixel order[i] of x `(n, c, h, w)`, counted row after row."""
    return to_image(to_tokens(x)[:, order], x.shape[2])


# The lecture calls the flattening suboptimal: it's lost which tokens were neighbours. Attention has no notion of a
# place, so permuting its input permutes its output and does nothing else. A U-Net can live with that, because the
# convolutions around the attention have put something of its neighbourhood into each pixel. A transformer (section 12)
# has to be told the places.
def show_flattening(out):
    print("\n1. An image becomes a sequence")
    torch.manual_seed(0)
    pictures, _, data_name = load_garments()
    x = nn.Conv2d(1, 8, 1)(pictures[-1:]).detach().double()  # n c h w: eight channels, each pixel for itself
    print(f"   activations {tuple(x.shape)} -> tokens {tuple(to_tokens(x).shape)}")

    order = torch.randperm(28 * 28)
    figure, axes = plt.subplots(2, 3, figsize=(7, 5.2))
    layers = {"attention": black_box, "convolution": nn.Conv2d(8, 8, 3, padding=1).double()}
    for row, (name, layer) in zip(axes, layers.items(), strict=True):
        plain, shuffled = layer(x).detach(), layer(permute_pixels(x, order)).detach()
        restored = permute_pixels(shuffled, order.argsort())
        error = relative_error(restored, plain)
        print(f"   {name} of shuffled pixels, put back in order: relative difference {error:.0e}")
        titles = (f"{name} of the garment", "of its shuffled pixels", f"put back in order: off by {error:.0e}")
        for ax, image, title in zip(row, (plain, shuffled, restored), titles, strict=True):
            plot_image(ax, image[0, 0], title, vmin=plain[0, 0].min(), vmax=plain[0, 0].max())
    figure.suptitle(f"Attention can't tell neighbours from strangers ({data_name})")
    save_picture(figure, out / "01_shuffled_pixels.png")


if __name__ == "__main__":
    show_flattening(out)


# %% 2. Why at all: the bunny's ear
# One ear of a bunny has its colour: how does the other ear, on the far side of the image, get the same? By convolutions
# alone, only step by step. What one pixel can know of another is a gradient: of an output pixel with respect to an
# input pixel. Where it is zero, nothing is known.
class Residual(nn.Module):
    """`x + branch(x)`: the branch has to learn only what is new."""

    def __init__(self, *layers):
        super().__init__()
        self.branch = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.branch(x)


def residual_block(channels):
    """Two 3×3 convolutions and a shortcut. There is no norm, through which all pixels would meet in the mean."""
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return Residual(nn.SiLU(), first, nn.SiLU(), second)


def influence(layer, x, row, column):
    """How much each pixel of x `(n, c, h, w)` bears on one pixel of `layer(x)`: the size of the gradient, `(h, w)`."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[:, :, row, column].sum(), x)
    return gradient.abs().sum(dim=(0, 1))


def show_reach(out):
    print("\n2. Why at all: which input pixels bear on one output pixel")
    torch.manual_seed(0)
    row, column = 12, 10
    pictures, _, data_name = load_garments()
    x = nn.Conv2d(1, 16, 1)(pictures[-1:])  # n c h w
    layers = {
        "3×3 convolution": nn.Conv2d(16, 16, 3, padding=1),
        "residual block": residual_block(16),
        "three of them": nn.Sequential(*(residual_block(16) for _ in range(3))),
        "attention": black_box,
    }
    figure, axes = plt.subplots(1, 5, figsize=(8, 2.4))
    plot_image(axes[0], pictures[-1, 0], f"the pixel\n({data_name})")
    axes[0].plot(column, row, "o", color="white", markerfacecolor="none")
    for ax, (name, layer) in zip(axes[1:], layers.items(), strict=True):
        gradient = influence(layer, x, row, column)
        seen = gradient.count_nonzero().item()
        print(f"   {name}: {seen} of {gradient.numel()} pixels")
        logarithm = (gradient / gradient.max()).log10()
        image = plot_image(ax, logarithm, f"{name}\n{seen} pixels", cmap="gray_r", vmin=-6, vmax=0)
    print(f"   from corner to corner: {max(x.shape[2:]) - 1} convolutions, each one pixel further; or one attention")
    figure.colorbar(image, ax=axes[-1], label="log₁₀ (gradient / largest)")
    figure.suptitle("What an output pixel depends on: convolutions see a neighbourhood, attention everything")
    save_picture(figure, out / "02_bunnys_ear.png")


if __name__ == "__main__":
    show_reach(out)


# %% 3. A weighted average of all pixels
# Each token has a question (its query q), a sign that says what it knows about (its key k) and an answer (its value v).
# How well a query fits a key is a number, the score. Softmax turns the scores of one query into weights, and with these
# the token averages the answers of all tokens.
def attention_weights(q, k):
    """How much each token hears of each: queries and keys `(..., s, d)` to weights `(..., s, s)`, whose rows sum to 1.

    Vaswani et al. 2017, section 3.2.1.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # ... s s; section 5 says why they are divided
    return scores.softmax(dim=-1)


# Weights that are not negative and sum to one keep every average between the smallest and the largest value of its
# channel. So however many layers follow each other, it's not the averaging that makes activations run away.
def show_average(out):
    print("\n3. A weighted average of all pixels")
    torch.manual_seed(0)
    pictures, _, _ = load_garments()
    x = nn.Conv2d(1, 16, 3, padding=1)(pictures[-1:]).detach()  # n c h w
    tokens = to_tokens(x)  # n (h w) c
    to_q, to_k, to_v, projection = (nn.Linear(16, 16) for _ in range(4))
    q, k, v = to_q(tokens), to_k(tokens), to_v(tokens)  # n (h w) c, each
    weights = attention_weights(q, k)  # n (h w) (h w)
    averages = weights @ v  # n (h w) c
    y = x + to_image(projection(averages), x.shape[2])  # n c h w: what was heard is added to what was there

    steps = {"x": x, "tokens": tokens, "q, k, v": v, "weights": weights, "averages": averages, "y": y}
    print("   " + " -> ".join(f"{name} {tuple(step.shape)}" for name, step in steps.items()))
    off = (weights.sum(dim=-1) - 1).abs().max()
    print(f"   the smallest weight is {weights.min():.0e}; the sum of a row differs from 1 by {off:.0e} at most")
    smallest, largest = v.amin(dim=1), v.amax(dim=1)  # n c
    margin = torch.minimum(averages.amin(dim=1) - smallest, largest - averages.amax(dim=1)) / (largest - smallest)
    print(f"   averages stay in the range of their channel's values: {margin.min():.0%} of it is left on either side")
    growth = (q @ k.mT @ v).abs().max() / v.abs().max()
    print(f"   scores as weights, without softmax: up to {growth:.0f} times the largest value")
    opened = to_image(attention_weights(tokens, tokens) @ tokens, x.shape[2])
    print(f"   the black box, opened: relative difference {relative_error(opened, black_box(x)):.0e}")


if __name__ == "__main__":
    show_average(out)


# %% 4. What one pixel looks at
# Nothing needs to be learned for a first look. Let the token of a pixel be the 5×5 patch around it, normalised, and
# query = key = token: those score highest that look alike, wherever they are (non-local means, Buades et al. 2005).
def patch_tokens(pictures, size=5):
    """The normalised patch around each pixel of `(n, 1, h, w)`: tokens `(n, h w, size²)`. Outside is background."""
    padded = F.pad(pictures, [size // 2] * 4, value=-1)
    patches = F.unfold(padded, size).mT  # n (h w) size²
    return F.layer_norm(patches, patches.shape[-1:])


def show_one_pixel(out):
    print("\n4. What one pixel looks at")
    pictures, classes, data_name = load_garments()
    figure, axes = plt.subplots(2, 4, figsize=(8, 4.7))
    row = 18
    for label, (above, below) in zip((1, 4, 6, 7), axes.T, strict=True):
        label %= len(classes)  # other data may have fewer
        column = (pictures[label, 0, row] > -0.5).int().argmax().item()  # in this row, where the garment begins
        tokens = patch_tokens(pictures[label, None])
        weights = attention_weights(tokens, tokens)  # 1 (h w) (h w)
        weights = weights[0, row * 28 + column].unflatten(0, (28, 28))  # h w: how much the pixel hears of each
        distant = weights[:, (torch.arange(28) - column).abs() > 5].sum()
        print(f"   {classes[label]}: {distant:.0%} of the weight lies more than five columns away")
        plot_image(above, pictures[label, 0], classes[label])
        plot_image(below, weights, f"{distant:.0%} is far away", cmap="gray_r")
        for ax, color in ((above, "white"), (below, "black")):
            ax.plot(column, row, "o", color=color, markerfacecolor="none", markersize=10)
    axes[0, 0].set_ylabel(data_name)
    axes[1, 0].set_ylabel("weights (black: largest)")
    figure.suptitle("The marked pixel hears those that look like it, however far away")
    save_picture(figure, out / "04_one_pixel.png")


if __name__ == "__main__":
    show_one_pixel(out)


# %% 5. Why the scores are divided by sqrt(d)
# A score is a sum of d products. If queries and keys have variance 1, it has variance d: the wider the tokens, the
# farther apart the scores, until softmax gives all the weight to one winner. The farther one leads, the less it matters
# by how much: hardly any gradient comes through, and hardly anything is learned.
def entropy(weights):
    """Of each row of weights `(..., s)`, in bits: 0 where one token has all, log2(s) where all have the same."""
    return -torch.xlogy(weights, weights).sum(dim=-1) / math.log(2)


def measure_spread(scores):
    """Of scores `(..., s, s)`: their standard deviation; the mean entropy of a row of weights; and how much gradient
    softmax lets through to a row (the sum of what each weight gains from its own score, at most 1)."""
    weights = scores.softmax(dim=-1)
    through = (weights * (1 - weights)).sum(dim=-1)  # the derivative of a weight by its own score is w (1 - w)
    return torch.stack([scores.std(), entropy(weights).mean(), through.mean()])


def show_spread(out):
    print("\n5. Why the scores are divided by sqrt(d): the weights of 256 tokens")
    torch.manual_seed(0)
    dims = [4, 8, 16, 32, 64, 128, 256]
    undivided, divided = [], []  # dims (spread, entropy, gradient)
    for d in dims:
        q, k = torch.randn(2, 4, 256, d)  # n s d, each
        scores = q @ k.mT  # n s s
        undivided.append(measure_spread(scores))
        divided.append(measure_spread(scores / math.sqrt(d)))
        lines = ("spread {:.2f}, entropy {:.2f} bits, gradient {:.2f}".format(*row[-1]) for row in (undivided, divided))
        print(f"   d = {d:3d}: {'; divided: '.join(lines)}")

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    for column, ax in enumerate(axes):
        ax.plot(dims, torch.stack(undivided)[:, column], "ko--", label="undivided")
        ax.plot(dims, torch.stack(divided)[:, column], "ks-", label="divided by √d")
        ax.set_xscale("log")
        ax.set(xlabel="width d of queries and keys")
        ax.set_xticks(dims, dims)
        ax.minorticks_off()
    axes[0].set(ylabel="standard deviation of the scores", ylim=0)
    axes[1].set(ylabel="entropy of the weights (bits)", ylim=(0, 8.8))
    axes[1].axhline(math.log2(256), color="gray", linewidth=1)
    axes[1].text(4, 8.1, "all 256 tokens have the same weight")
    axes[0].legend()
    figure.suptitle("Undivided, the scores of wide tokens leave softmax with a single winner")
    save_picture(figure, out / "05_why_divide.png")


if __name__ == "__main__":
    show_spread(out)


# %% 6. A layer: with three projections, and with one
def check_activations(x, channels):
    """ValueError unless x is `(n, channels, h, w)` with at least one pixel: softmax over nothing is not a number."""
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"expected activations (n, {channels}, h, w) with h, w >= 1, got {tuple(x.shape)}")


class SelfAttention(nn.Module):
    """Every pixel asks all pixels, and adds what it hears to itself. Activations `(n, c, h, w)` in and out.

    The norm sees to it that queries and keys don't grow with x. It is a group norm, which knows nothing of the other
    images of the batch (lesson 3 says more).
    """

    def __init__(self, channels, groups=1):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        check_activations(x, self.norm.num_channels)
        tokens = to_tokens(self.norm(x))  # n (h w) c
        weights = attention_weights(self.q(tokens), self.k(tokens))  # n (h w) (h w)
        heard = self.proj(weights @ self.v(tokens))  # n (h w) c
        return x + to_image(heard, x.shape[2])  # n c h w


# Three projections of the same tokens are one projection with three times as many outputs. A computer prefers it: one
# large matrix product keeps it busier than three small ones.
def stack(*projections):
    """Several `nn.Linear` of the same input as a single one, which gives their outputs side by side."""
    weight = torch.cat([projection.weight for projection in projections])  # (projections out) in
    stacked = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    stacked.load_state_dict({"weight": weight, "bias": torch.cat([projection.bias for projection in projections])})
    return stacked


def show_layer(out):
    print("\n6. A layer: with three projections, and with one")
    torch.manual_seed(0)
    attention = SelfAttention(32, groups=4)
    x = torch.randn(2, 32, 8, 8)
    y = attention(x)
    print(f"   {tuple(x.shape)} -> {tuple(y.shape)}")
    qkv = stack(attention.q, attention.k, attention.v)
    tokens = to_tokens(attention.norm(x))  # n (h w) c
    q, k, v = qkv(tokens).chunk(3, dim=-1)  # n (h w) (three c) -> n (h w) c, three times
    again = x + to_image(attention.proj(attention_weights(q, k) @ v), x.shape[2])
    print(f"   with q, k and v from one Linear, {tuple(qkv.weight.shape)}: off by {relative_error(again, y):.0e}")


if __name__ == "__main__":
    show_layer(out)


# %% 7. Several heads
# Softmax tends to pick one winner, so one attention looks at one place (section 8 tries it). Several heads look at
# several: the channels are split, each part attends for itself, and the results are joined.
def split_heads(tokens, heads):
    """`(n, s, c)` to `(n, heads, s, d)`, where d is c / heads."""
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)  # n s (heads d) -> n s heads d -> n heads s d


def join_heads(tokens):
    """Back again: `(n, heads, s, d)` to `(n, s, c)`."""
    return tokens.transpose(1, 2).flatten(2)  # n heads s d -> n s heads d -> n s (heads d)


# From here on rearrange does this, with the comment in the place of the code; section 10 is about it. The scores, their
# softmax and the average are left to one fused kernel; section 11 is about that.
def fused_attention(q, k, v):
    """`F.scaled_dot_product_attention`, but on a CPU never in bfloat16, which takes several times as long backwards."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
    return F.scaled_dot_product_attention(q, k, v)


class TokenSelfAttention(nn.Module):
    """Every token asks all tokens, in several heads at once. Tokens `(n, s, c)` in and out, no norm, no residual.

    channels: c. heads: how many, each `channels // heads` wide. Raises ValueError where heads doesn't divide channels.

    Vaswani et al. 2017, section 3.2.2; lecture section "multi-head attention".
    """

    def __init__(self, channels, heads):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"the number of heads must divide the channels, got {heads} heads, {channels} channels")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens, return_weights=False):
        """With `return_weights`, also the weights `(n, heads, s, s)`: row i says how much token i hears of each.

        Raises ValueError for another number of dimensions or channels, or no tokens.
        """
        channels = self.proj.in_features
        if tokens.ndim != 3 or tokens.shape[1] == 0 or tokens.shape[2] != channels:
            raise ValueError(f"expected tokens (n, s, {channels}) with s >= 1, got {tuple(tokens.shape)}")
        qkv = self.qkv(tokens)  # n s (three heads d)
        q, k, v = rearrange(qkv, "n s (three heads d) -> three n heads s d", three=3, heads=self.heads)
        if return_weights:
            weights = attention_weights(q, k)  # n heads s s
            heard = weights @ v  # n heads s d
        else:
            heard = fused_attention(q, k, v)  # n heads s d: the same, but it never holds all weights
        heard = self.proj(rearrange(heard, "n heads s d -> n s (heads d)"))
        return (heard, weights) if return_weights else heard


class MultiHeadSelfAttention(TokenSelfAttention):
    """The same for pixels, with norm and residual: activations `(n, c, h, w)` in and out.

    groups: of the group norm. Raises ValueError where heads or groups don't divide channels.

    Ho et al. 2020, appendix B.
    """

    def __init__(self, channels, heads, groups=1):
        super().__init__(channels, heads)
        if groups < 1 or channels % groups:
            raise ValueError(f"the number of groups must divide the channels, got {groups} groups, {channels} channels")
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x, return_weights=False):
        """With `return_weights`, also the weights `(n, heads, h w, h w)`: row i says how much pixel i hears of each.

        Raises ValueError for another number of dimensions or channels, or no pixels.
        """
        check_activations(x, self.norm.num_channels)
        heard = super().forward(to_tokens(self.norm(x)), return_weights)  # n (h w) c
        if return_weights:
            heard, weights = heard
        y = x + to_image(heard, x.shape[2])  # n c h w
        return (y, weights) if return_weights else y


# The lecture splits into heads before it separates q, k and v, so in its weights the three of each head stand together.
# PyTorch separates first, and so do we. The layer is the same, only its rows stand in another order.
def to_pytorch_layout(rows, heads):
    """The rows of the lecture's qkv weight `(3 c, c)` or bias `(3 c,)` in PyTorch's order, which is also ours."""
    return rearrange(rows, "(heads three d) ... -> (three heads d) ...", heads=heads, three=3)


def show_heads(out):
    print("\n7. Several heads")
    torch.manual_seed(0)
    tokens = torch.randn(2, 64, 32)  # n s c
    split = split_heads(tokens, heads=4)
    joined = join_heads(split)
    print(f"   tokens {tuple(tokens.shape)} -> heads {tuple(split.shape)} -> tokens {tuple(joined.shape)}")
    same = torch.equal(split, rearrange(tokens, "n s (heads d) -> n heads s d", heads=4))
    same &= torch.equal(joined, rearrange(split, "n heads s d -> n s (heads d)"))
    print(f"   rearrange gives exactly the same: {same}")

    attention = MultiHeadSelfAttention(32, heads=4, groups=4)
    x = torch.randn(2, 32, 8, 8)
    y, weights = attention(x, return_weights=True)
    print(f"   {tuple(x.shape)} -> {tuple(y.shape)} with weights {tuple(weights.shape)}")
    print(f"   the fused kernel instead of explicit weights: relative difference {relative_error(attention(x), y):.0e}")

    names = [f"{part}{head}" for head in (1, 2) for part in "qkv"]
    order = to_pytorch_layout(torch.arange(6), heads=2)
    print(f"   two heads: the lecture's rows {' '.join(names)} are PyTorch's {' '.join(names[i] for i in order)}")
    rows = torch.randn(3 * 32, 32)
    lecture = rearrange(tokens @ rows.mT, "n s (heads three d) -> three n heads s d", three=3, heads=4)
    ours = tokens @ to_pytorch_layout(rows, heads=4).mT
    ours = rearrange(ours, "n s (three heads d) -> three n heads s d", three=3, heads=4)
    print(f"   q, k and v either way: relative difference {relative_error(ours, lecture):.0e}")


if __name__ == "__main__":
    show_heads(out)


# %% 8. What heads are for
# Every pixel of an image has a pattern of six numbers. Two of them, at random places, are marked as the left and the
# right ear, and every pixel is asked for the patterns of both. One head gives one average of the two, so half of the
# answer is lost however it weighs them. (Not quite: the weights may depend on the patterns, and so carry a little more.
# With 1500 steps in place of 200, one head came down to an error of 0.42.) Two heads look at one ear each.
IMAGE_SIZE, PATTERN = 5, 6


def make_ears(n):
    """Images `(n, 6 + 2, 5, 5)`, whose last two channels mark the left and the right ear, and answers `(n, 2 * 6)`."""
    patterns = torch.randn(n, PATTERN, IMAGE_SIZE**2)  # n c (h w)
    places = torch.rand(n, IMAGE_SIZE**2).topk(2).indices  # n ears: two different pixels
    marks = F.one_hot(places, IMAGE_SIZE**2).float()  # n ears (h w)
    images = torch.cat([patterns, marks], dim=1).unflatten(2, (IMAGE_SIZE, IMAGE_SIZE))  # n c h w
    answers = marks @ patterns.mT  # n ears c
    return images, answers.flatten(1)


def ear_error(model, images, answers):
    """Mean squared error over all pixels: 1 where nothing is known (the patterns have variance 1), 0 where all is."""
    return (model(images) - answers[:, :, None, None]).square().mean()


def train_ears(heads, steps=200, seed=0):
    """A model that is asked for the ears, after its training, and its error at each step."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(PATTERN + 2, 24, 1), MultiHeadSelfAttention(24, heads), nn.Conv2d(24, 2 * PATTERN, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    errors = []
    for _ in range(steps):
        error = ear_error(model, *make_ears(64))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        errors.append(error.item())
    return model.requires_grad_(False), errors


def show_ears(out):
    print("\n8. What heads are for: asked for the patterns of two ears")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower on several
    trained = {"1 head": train_ears(1), "2 heads": train_ears(2)}
    torch.set_num_threads(threads)

    torch.manual_seed(1)
    images, answers = make_ears(1000)
    marks = images[:, -2:].flatten(2)  # n ears (h w)
    panels = {"the two ears": marks[0].sum(dim=0)}
    figure, axes = plt.subplot_mosaic("CCAB;CCDE", figsize=(8, 4))
    for (name, (model, errors)), style in zip(trained.items(), ("k--", "k-"), strict=True):
        error = ear_error(model, images, answers)
        print(f"   {name}: error {error:.4f} on 1000 new images")
        axes["C"].semilogy(errors, style, label=f"{name}: {error:.2g}")
        _, weights = model[1](model[0](images), return_weights=True)  # n heads (h w) (h w)
        heard = weights.mean(dim=2)  # n heads (h w): the mean over all pixels that ask
        shares = (heard @ marks.mT).mean(dim=0)  # heads ears
        for head, (left, right) in enumerate(shares):
            print(f"      head {head + 1} gives {left:.0%} of its weight to the left ear, {right:.0%} to the right one")
            panels[name if len(shares) == 1 else f"{name}: head {head + 1}"] = heard[0, head]
    axes["C"].set(xlabel="step of training", ylabel="error (1: nothing is known)")
    axes["C"].legend(loc=(0.48, 0.5), title="on new images")
    places = [divmod(place, IMAGE_SIZE) for place in marks[0].argmax(dim=1).tolist()]
    for letter, (title, panel) in zip("ABDE", panels.items(), strict=True):
        panel = panel.unflatten(0, (IMAGE_SIZE, IMAGE_SIZE))
        plot_image(axes[letter], panel, title, cmap="gray_r", vmin=0, vmax=1)
        for name, (row, column) in zip("LR", places, strict=True):
            color = "white" if panel[row, column] > 0.5 else "black"
            axes[letter].text(column, row, name, color=color, ha="center", va="center")
    figure.suptitle("One head can't look at two ears at once; two heads can")
    save_picture(figure, out / "08_heads.png")


if __name__ == "__main__":
    show_ears(out)


# %% 9. Against PyTorch's own
def to_torch(attention):
    """PyTorch's class with a copy of our weights: tokens `(n, s, c)` in and out, without our norm and residual."""
    twin = nn.MultiheadAttention(attention.proj.in_features, attention.heads, batch_first=True)
    twin = twin.to(attention.qkv.weight).train(attention.training)  # .to(weight): its type, its device
    state = {f"in_proj_{name}": parameter for name, parameter in attention.qkv.state_dict().items()}
    state |= {f"out_proj.{name}": parameter for name, parameter in attention.proj.state_dict().items()}
    twin.load_state_dict(state)
    return twin


# PyTorch's class expects (s, n, c) unless batch_first=True says otherwise. Given (n, s, c), it can't see that anything
# is wrong: it takes images for tokens and tokens for images. Each pixel then hears the same pixel of the other images.
def show_torch(out):
    print("\n9. Against PyTorch's own")
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        attention = TokenSelfAttention(32, heads=4).to(dtype)
        twin = to_torch(attention)
        tokens = torch.randn(3, 64, 32, dtype=dtype, requires_grad=True)  # n s c
        ours, theirs = attention(tokens), twin(tokens, tokens, tokens)[0]
        gradients = [torch.autograd.grad(result.square().sum(), tokens)[0] for result in (ours, theirs)]
        error, gradient_error = relative_error(ours, theirs), relative_error(*gradients)
        print(f"   {dtype}: relative difference of outputs {error:.0e}, of gradients {gradient_error:.0e}")

    careless = nn.MultiheadAttention(32, num_heads=4)
    careless.load_state_dict(twin.state_dict())
    changed = tokens.detach().clone()
    changed[1] += 1
    for name, model in {"with batch_first=True": twin, "without": careless}.items():
        result, result_changed = model(tokens, tokens, tokens)[0], model(changed, changed, changed)[0]
        print(f"   {name}: {tuple(tokens.shape)} -> {tuple(result.shape)}, off by {relative_error(result, ours):.0e};")
        print(f"      a change to image 1 changes image 0 by {relative_error(result_changed[0], result[0]):.0e}")


if __name__ == "__main__":
    show_torch(out)


# %% 10. rearrange
# view, permute and reshape move axes by number, rearrange by name. So it can be read, and can check what it is given.
# Each entry: the shape of x, what rearrange does to it, and the same by hand.
GALLERY = {
    "transpose": (
        (2, 64, 32),
        lambda x: rearrange(x, "n s c -> n c s"),
        lambda x: x.transpose(1, 2),
    ),
    "pixels to tokens": (
        (2, 32, 8, 8),
        lambda x: rearrange(x, "n c h w -> n (h w) c"),
        lambda x: x.permute(0, 2, 3, 1).reshape(2, 64, 32),
    ),
    "split heads": (
        (2, 64, 32),
        lambda x: rearrange(x, "n s (heads d) -> n heads s d", heads=4),
        lambda x: x.view(2, 64, 4, 8).permute(0, 2, 1, 3),
    ),
    "patches to tokens": (
        (2, 1, 28, 28),
        lambda x: rearrange(x, "n c (h p) (w q) -> n (h w) (p q c)", p=4, q=4),
        lambda x: x.view(2, 1, 7, 4, 7, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 49, 16),
    ),
    "grid of images": (
        (6, 28, 28),
        lambda x: rearrange(x, "(rows columns) h w -> (rows h) (columns w)", rows=2),
        lambda x: x.view(2, 3, 28, 28).permute(0, 2, 1, 3).reshape(56, 84),
    ),
}


def show_rearrange(out):
    print("\n10. rearrange")
    torch.manual_seed(0)
    for name, (shape, by_name, by_hand) in GALLERY.items():
        x = torch.randn(shape)
        y = by_name(x)
        print(f"   {name}: {shape} -> {tuple(y.shape)}, the same by hand: {torch.equal(y, by_hand(x))}")
    x = torch.randn(2, 64, 32)
    attempts = {
        "rearrange": lambda x: rearrange(x, "n s (heads d) -> n heads s d", heads=5),
        "view": lambda x: x.view(2, 64, 5, 6),
    }
    for name, attempt in attempts.items():
        try:
            attempt(x)
        except (EinopsError, RuntimeError) as error:
            print(f"   32 channels, 5 heads, says {name}: {str(error).splitlines()[-1].strip()}")

    pictures, _, data_name = load_garments()
    pictures = pictures[torch.arange(6) % len(pictures), 0]  # n h w
    _, to_grid, _ = GALLERY["grid of images"]
    patches = rearrange(pictures[0], "(h p) (w q) -> h w p q", p=7, q=7)
    apart = rearrange(F.pad(patches, (0, 1, 0, 1), value=1), "h w p q -> (h p) (w q)")[:-1, :-1]
    tokens = rearrange(pictures, "n h w -> (h w) n")
    wrong = tokens.reshape(6, 28, 28)  # the right shape, so nothing complains; but the last axis was n, and now is w
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.5), width_ratios=(3, 2, 3))
    plot_image(axes[0], to_grid(pictures), f"grid of images ({data_name})")
    plot_image(axes[1], apart, "patches")
    plot_image(axes[2], to_grid(wrong), "(h w) n reshaped to n h w")
    figure.suptitle("rearrange knows the axes; reshape gives wrong pixels without an error")
    save_picture(figure, out / "10_rearrange.png")


if __name__ == "__main__":
    show_rearrange(out)


# %% 11. Where to put it
# Every pixel asks every pixel: twice the side is four times the tokens and sixteen times the weights. The fused kernel
# (Dao et al. 2022) computes a block of weights, uses it and forgets it, and computes it anew for the backward pass. It
# needs no memory for them, and is much faster although it computes more: by hand, most of the time goes into taking
# weights to memory and back. But it's still every pixel with every pixel, so its time grows in the same way. That is
# why a U-Net attends at low resolutions only, where a pixel also stands for a whole region of the image.
def forward_backward(layer, x):
    layer(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()  # or we would not wait for it


def measure_seconds(layers, x, enough=0.5):
    """Seconds of one forward and backward pass of each layer: the fastest of several rounds, at least two, until
    `enough` seconds have passed. Whatever else the machine has to do, fresh memory for one, only adds to a time."""
    rounds = []  # rounds layers: one pass of each, so that a disturbance doesn't meet the same layer every time
    began = time.perf_counter()
    while len(rounds) < 2 or (len(rounds) < 20 and time.perf_counter() - began < enough):
        times = [time.perf_counter()]
        for layer in layers:
            forward_backward(layer, x)
            times.append(time.perf_counter())
        rounds.append(np.diff(times))
    return np.min(rounds, axis=0).tolist()


def measure_kept(layer, x):
    """Bytes that autograd keeps from the forward pass of one image for the backward pass, parameters not counted."""
    x = x[:1].detach().clone().requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def measure_peak(layer, x):
    """Bytes that a forward and backward pass adds, at its peak, to what is on the GPU already."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(layer, x)
    return torch.cuda.max_memory_allocated() - before


class ExplicitSelfAttention(MultiHeadSelfAttention):
    """The same by hand, with all the weights in memory."""

    def forward(self, x):
        return super().forward(x, return_weights=True)[0]


def measure_cost(device, sides=(4, 8, 16, 32, 64), channels=64, heads=8, batch=16):
    """For each side of a square image: a dictionary with "tokens", "batch", and for one image the bytes of all weights
    ("weights") and, for each layer by its name, "seconds", bytes "kept" and, on a GPU, bytes at the "peak"."""
    torch.manual_seed(0)
    layers = {
        "by hand": ExplicitSelfAttention(channels, heads).to(device),
        "fused": MultiHeadSelfAttention(channels, heads).to(device),
        "3×3 convolution": nn.Conv2d(channels, channels, 3, padding=1).to(device),
    }
    costs = {}
    for side in sides:
        weights = 4 * heads * side**4  # bytes in float32
        n = min(batch, max(1, 10**9 // weights))
        x = torch.randn(n, channels, side, side, device=device, requires_grad=True)
        if not costs:
            measure_seconds(layers.values(), x)  # not counted: everything starts up
        seconds = measure_seconds(layers.values(), x)
        cost = {"tokens": side**2, "batch": n, "weights": weights}
        cost["seconds"] = {name: total / n for name, total in zip(layers, seconds, strict=True)}
        cost["kept"] = {name: measure_kept(layer, x) for name, layer in layers.items()}
        if x.is_cuda:
            cost["peak"] = {name: measure_peak(layer, x) / n for name, layer in layers.items()}
        costs[side] = cost
    return costs


def show_cost(out):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n11. Where to put it: 64 channels, 8 heads, forward and backward, for one image, on {hardware}")
    print("                               milliseconds                       megabytes")
    print("    side  tokens  batch    by hand     fused   faster    all weights  kept by hand  kept fused")
    costs = measure_cost(device)
    for side, cost in costs.items():
        by_hand, fused, _ = (1000 * seconds for seconds in cost["seconds"].values())
        megabytes = [size / 1e6 for size in (cost["weights"], cost["kept"]["by hand"], cost["kept"]["fused"])]
        print(
            f"   {side:5d}{cost['tokens']:8d}{cost['batch']:7d}{by_hand:11.2f}{fused:10.2f}{by_hand / fused:8.1f}×"
            + "{:15.3f}{:14.3f}{:12.3f}".format(*megabytes)
        )
        if "peak" in cost:
            print("      at the peak: " + ", ".join(f"{name} {size / 1e6:.3f}" for name, size in cost["peak"].items()))

    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
    styles = {"by hand": "ko--", "fused": "ks-", "3×3 convolution": "k^:"}
    panels = {"seconds": (1e3, "milliseconds for one image"), "kept": (1e-6, "megabytes kept for the backward pass")}
    for ax, (quantity, (unit, label)) in zip(axes, panels.items(), strict=True):
        for name, style in styles.items():
            ax.loglog(list(costs), [unit * cost[quantity][name] for cost in costs.values()], style, label=name)
        ax.axvspan(3.5, 22, color="0.88", label="lesson 4's U-Net attends here")
        ax.set(xlabel="side of the image in pixels", ylabel=label, xlim=(3.5, 74))
        ax.set_xticks(list(costs), costs)
        ax.minorticks_off()
    axes[0].legend(fontsize=9)
    *_, near, _, far = costs
    growth = [costs[far]["seconds"][name] / costs[near]["seconds"][name] for name in styles]
    figure.suptitle(
        f"{far}×{far} pixels instead of {near}×{near}: attention takes {growth[0]:.0f} times as long by hand,\n"
        f"{growth[1]:.0f} times as long fused; a 3×3 convolution takes {growth[2]:.0f} times as long",
        fontsize=11,
    )
    save_picture(figure, out / "11_cost.png")


if __name__ == "__main__":
    show_cost(out)


# %% 12. Transformers
# Attention carries information from token to token; what a token makes of it is the work of a small network, the same
# for all. The two in turn, each with a norm and a residual, are a transformer. The norm is one of each token alone.
#
# What a convolution has built in, that neighbours belong together, a transformer has to find out from its data. What
# that costs, and how much of it pre-training gives back, is measured in tests/measure_data_efficiency.py.
class TransformerBlock(nn.Module):
    """Tokens `(n, s, c)` in and out. Raises ValueError where heads doesn't divide channels.

    Norm first, as in Dosovitskiy et al. 2021, section 3.1. It is the same function as
    `nn.TransformerEncoderLayer(channels, heads, 4 * channels, activation="gelu", norm_first=True)` without dropout.
    """

    def __init__(self, channels, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = TokenSelfAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, tokens):
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """Images `(n, channels_in, size, size)` to a score for each class, `(n, n_classes)`.

    A token is a patch of `patch × patch` pixels, and a learned vector says where it was. Raises ValueError where patch
    doesn't divide size, or heads doesn't divide channels.

    Dosovitskiy et al. 2021, with the mean of all tokens in the place of a class token.
    """

    def __init__(self, size=28, patch=4, channels=64, depth=4, heads=4, n_classes=10, channels_in=1):
        super().__init__()
        if patch < 1 or size % patch:
            raise ValueError(f"the side of a patch must divide that of the image, got {patch} and {size}")
        self.image_shape = channels_in, size, size
        self.patch = patch
        self.embed = nn.Linear(channels_in * patch**2, channels)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, channels))  # s c
        self.blocks = nn.Sequential(*(TransformerBlock(channels, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels)
        self.classify = nn.Linear(channels, n_classes)

    def to_patches(self, x):
        """`(n, channels_in, size, size)` to `(n, s, patch * patch * channels_in)`, ValueError for other shapes."""
        if x.ndim != 4 or x.shape[1:] != self.image_shape:
            raise ValueError(f"expected images (n, {', '.join(map(str, self.image_shape))}), got {tuple(x.shape)}")
        return rearrange(x, "n c (h p) (w q) -> n (h w) (p q c)", p=self.patch, q=self.patch)

    def encode(self, x):
        """What the transformer makes of each patch, `(n, s, c)`."""
        tokens = self.embed(self.to_patches(x)) + self.positions  # n s c
        return self.norm(self.blocks(tokens))

    def forward(self, x):
        return self.classify(self.encode(x).mean(dim=1))  # n s c -> n c -> n n_classes


def show_transformer(out):
    print("\n12. Transformers")
    torch.manual_seed(0)
    model = VisionTransformer().requires_grad_(False)
    picture = load_garments()[0][-1:]  # n c h w
    patches = model.to_patches(picture)
    steps = {"image": picture, "patches": patches, "tokens": model.embed(patches), "scores": model(picture)}
    print("   " + " -> ".join(f"{name} {tuple(step.shape)}" for name, step in steps.items()))
    print(f"   {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    shuffled = patches[:, torch.randperm(patches.shape[1])]
    shuffled = rearrange(shuffled, "n (h w) (p q c) -> n c (h p) (w q)", h=7, p=4, q=4)
    print(f"   patches in disorder change its answer by {relative_error(model(shuffled), model(picture)):.0e}")
    model.positions.zero_()
    print(f"   and without the positions by {relative_error(model(shuffled), model(picture)):.0e}")


if __name__ == "__main__":
    show_transformer(out)


# %% 13. A transformer can express any convolution
# Nine heads, each of which hears one of the nine pixels under the kernel (Cordonnier et al. 2020). The scores depend on
# places only: minus the squared distance from the wanted pixel, times a number so large that this pixel gets all the
# weight. Beyond the border there is no wanted pixel. Softmax has to give the weight to somebody, and it would be the
# nearest pixel; but a convolution finds a zero there. So there is one more token, which holds zeros. Its score is
# half-way between that of the wanted pixel, if there is one, and that of the next best.
class PositionAttention(nn.Module):
    """Attention by place alone: head i hears the pixel that is offsets[i] away, `(rows, columns)`, or zeros.

    Activations `(n, channels_in, h, w)` to `(n, channels_out, h, w)`. The value of a pixel is all its channels.
    """

    def __init__(self, channels_in, channels_out, offsets, bias=True, sharpness=100.0):
        super().__init__()
        self.channels_in = channels_in
        self.sharpness = sharpness
        self.register_buffer("offsets", torch.tensor(offsets, dtype=torch.float32))  # heads 2
        self.proj = nn.Linear(len(offsets) * channels_in, channels_out, bias=bias)

    def scores(self, height, width):
        """`(heads, h w, h w + 1)`: of each pixel for all pixels, and last for the token of zeros."""
        rows, columns = (torch.arange(size).to(self.offsets) for size in (height, width))
        pixels = torch.cartesian_prod(rows, columns)  # (h w) 2
        wanted = pixels + self.offsets[:, None]  # heads (h w) 2
        distances = (wanted[:, :, None] - pixels).square().sum(dim=-1)  # heads (h w) (h w), squared
        return -self.sharpness * F.pad(distances, (0, 1), value=0.5)

    def forward(self, x):
        check_activations(x, self.channels_in)
        tokens = F.pad(to_tokens(x), (0, 0, 0, 1))  # n (h w + 1) c: the last one holds zeros
        weights = self.scores(*x.shape[2:]).softmax(dim=-1)  # heads (h w) (h w + 1)
        heard = weights @ tokens[:, None]  # n heads (h w) c
        return to_image(self.proj(rearrange(heard, "n heads s c -> n s (heads c)")), x.shape[2])


def attention_from_convolution(conv):
    """An attention layer that is the same function as a 3×3 convolution, on images of any size, borders included.

    Raises ValueError for anything but an `nn.Conv2d` with a 3×3 kernel, stride 1, padding 1 with zeros, dilation 1 and
    groups 1.
    """
    expected = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "padding_mode": "zeros"}
    expected |= {"dilation": (1, 1), "groups": 1}
    if not isinstance(conv, nn.Conv2d) or any(getattr(conv, name) != value for name, value in expected.items()):
        raise ValueError(f"expected an nn.Conv2d with {expected}, got {conv}")
    offsets = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    attention = PositionAttention(conv.in_channels, conv.out_channels, offsets, bias=conv.bias is not None)
    attention.to(conv.weight)
    weight = rearrange(conv.weight, "out c rows columns -> out (rows columns c)")
    attention.proj.load_state_dict(conv.state_dict() | {"weight": weight})
    return attention


def show_convolution(out):
    print("\n13. A transformer can express any convolution")
    torch.manual_seed(0)
    for channels_in, channels_out, height, width in ((1, 1, 1, 1), (3, 5, 1, 7), (16, 8, 5, 3), (32, 32, 28, 28)):
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        x = torch.randn(2, channels_in, height, width)
        error = relative_error(attention_from_convolution(conv)(x), conv(x))
        print(f"   {channels_in} to {channels_out} channels, {height}×{width}: relative difference {error:.0e}")

    pictures, _, data_name = load_garments()
    x = pictures[-1:]  # n c h w
    conv = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)
    attention = attention_from_convolution(conv).requires_grad_(False)
    expected = conv(x)
    weights = attention.scores(28, 28)[:, :, :-1].softmax(dim=-1)  # heads (h w) (h w), the token of zeros left out
    plain = attention.proj(rearrange(weights @ to_tokens(x), "heads s 1 -> 1 s heads"))
    errors = (attention(x) - expected).abs(), (to_image(plain, 28) - expected).abs()
    inside = errors[1][:, :, 1:-1, 1:-1].max()
    print(f"   without the token of zeros: off by {inside:.0e} inside, by {errors[1].max():.0e} at the border")

    figure = plt.figure(figsize=(8, 4.2))
    left, right = figure.subfigures(1, 2)
    weights = attention.scores(5, 5).softmax(dim=-1)[:, 0]  # heads (h w + 1): of the pixel in the top left corner
    for ax, head in zip(left.subplots(3, 3).flat, weights, strict=True):
        plot_image(ax, head[:-1].unflatten(0, (5, 5)), f"zeros: {head[-1]:.0%}", cmap="gray_r", vmin=0, vmax=1)
        ax.plot(0, 0, "o", color="gray", markersize=4)
    left.suptitle("what each head of the marked pixel hears", fontsize=11)
    (above, below) = right.subplots(2, 2)
    for ax, image, title in zip(above, (x, expected), (data_name, "the convolution of it"), strict=True):
        plot_image(ax, image[0, 0], title)
    for ax, error, title in zip(below, errors, ("with the zeros", "without"), strict=True):
        plot_image(ax, error[0, 0], f"{title}: off by {error.max():.0e}", cmap="gray_r", vmin=0, vmax=errors[1].max())
    right.suptitle("the same function (below: errors, on one scale)", fontsize=11)
    figure.suptitle("Nine heads are a 3×3 convolution, and a token of zeros makes it right at the border")
    save_picture(figure, out / "13_convolution.png")


if __name__ == "__main__":
    show_convolution(out)
