"""Lesson 2: pixels look at each other.

A convolution sees a neighbourhood. Attention makes each pixel a weighted average of all pixels, with weights that
depend on what the pixels hold (Vaswani et al. 2017; lecture section "self-attention").

    python 02_attention.py [--out DIR]
"""

# %% What this lesson needs
import functools
import importlib
import math
import statistics
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange
from torch import nn

from data import load

time_embedding = importlib.import_module("01_time_embedding")
Parser = time_embedding.Parser
save_picture = time_embedding.save_picture


@functools.cache
def load_test():
    return load("auto", "test")


def garment(label):
    """The first test picture with this label, `(1, 1, 28, 28)` in [-1, 1]. Data of another size is resized."""
    data = load_test()
    firsts = np.unique(data.labels, return_index=True)[1]  # one picture of each class
    picture = torch.from_numpy(data.images[firsts[label % len(firsts)]])  # h w, uint8
    return F.interpolate(picture[None, None] / 127.5 - 1, size=(28, 28))


def relative_error(result, expected):
    """The largest difference anywhere, in units of the largest expected value."""
    return ((result - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    out = Parser(__file__, __doc__).parse_args().out


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


# The lecture calls the flattening suboptimal: which tokens were neighbours is lost. Attention has no notion of a place,
# so permuting its input permutes its output and does nothing else. A U-Net can live with that, since the convolutions
# around the attention have put something of its neighbourhood into each pixel; a transformer (section 11) can't.
def show_flattening(out):
    print("\n1. An image becomes a sequence")
    torch.manual_seed(0)
    picture = garment(9)
    x = nn.Conv2d(1, 8, 1)(picture).detach()  # n c h w: eight channels, each pixel for itself
    height = x.shape[2]
    print(f"   activations {tuple(x.shape)} -> tokens {tuple(to_tokens(x).shape)}")

    order = torch.randperm(to_tokens(x).shape[1])

    def reorder(x, order):
        return to_image(to_tokens(x)[:, order], height)

    figure, axes = plt.subplots(2, 3, figsize=(7, 5.2))
    layers = {"attention": black_box, "3×3 convolution": nn.Conv2d(8, 8, 3, padding=1)}
    for row, (name, layer) in zip(axes, layers.items(), strict=True):
        plain, shuffled = layer(x).detach(), layer(reorder(x, order)).detach()
        restored = reorder(shuffled, order.argsort())
        error = relative_error(restored, plain)
        print(f"   {name}: of shuffled pixels, put back in order: relative difference {error:.1e}")
        titles = (f"{name} of the garment", "of its shuffled pixels", f"put back: differs by {error:.0e}")
        for ax, image, title in zip(row, (plain, shuffled, restored), titles, strict=True):
            ax.imshow(image[0, 0], vmin=plain[0, 0].min(), vmax=plain[0, 0].max())
            ax.set_title(title, fontsize=9)
            ax.set(xticks=[], yticks=[])
    figure.suptitle(f"Attention can't tell neighbours from strangers ({load_test().name})")
    save_picture(figure, out / "01_shuffled_pixels.png")


if __name__ == "__main__":
    show_flattening(out)


# %% 2. Why at all: the bunny's ear
# One ear of a bunny is drawn: how does the other ear, on the far side of the image, learn its colour? Through
# convolutions, only step by step. What a pixel can know of another one is a gradient: of an output pixel with respect
# to an input pixel.
class Residual(nn.Module):
    """`x + branch(x)`: the branch has to learn only what is new."""

    def __init__(self, *branch):
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x):
        return x + self.branch(x)


def residual_block(channels):
    """Two 3×3 convolutions. It has no norm: that would show every pixel a little of the whole image's mean."""
    convolutions = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return Residual(*(layer for convolution in convolutions for layer in (nn.SiLU(), convolution)))


def influence(layer, x, row, column):
    """How much each pixel of x `(n, c, h, w)` bears on one pixel of `layer(x)`: the gradient's size, `(h, w)`."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[:, :, row, column].sum(), x)
    return gradient.abs().sum(dim=(0, 1))


def show_reach(out):
    print("\n2. Why at all: which input pixels bear on one output pixel")
    torch.manual_seed(0)
    row, column = 12, 10
    picture = garment(9)
    x = nn.Conv2d(1, 16, 1)(picture)
    layers = {
        "3×3 convolution": nn.Conv2d(16, 16, 3, padding=1),
        "residual block": residual_block(16),
        "three of them": nn.Sequential(*(residual_block(16) for _ in range(3))),
        "attention": black_box,
    }
    figure, axes = plt.subplots(1, 5, figsize=(10, 2.7))
    axes[0].imshow(picture[0, 0])
    axes[0].plot(column, row, "o", color="white", markerfacecolor="none", markersize=9)
    axes[0].set_title(f"the pixel\n({load_test().name})", fontsize=10)
    for ax, (name, layer) in zip(axes[1:], layers.items(), strict=True):
        gradient = influence(layer, x, row, column)
        seen = gradient.count_nonzero().item()
        print(f"   {name}: {seen} of {gradient.numel()} pixels")
        image = ax.imshow((gradient / gradient.max()).log10(), cmap="gray_r", vmin=-6, vmax=0)
        ax.set_title(f"{name}\n{seen} pixels", fontsize=10)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    print(f"   from corner to corner of {x.shape[2]}×{x.shape[3]} pixels: {max(x.shape[2:]) - 1} convolutions, 1 attention")
    figure.colorbar(image, ax=axes[-1], label="log₁₀ of gradient / largest")
    figure.suptitle("What one output pixel depends on: convolutions see a neighbourhood, attention everything")
    save_picture(figure, out / "02_bunnys_ear.png")


if __name__ == "__main__":
    show_reach(out)


# %% 3. A weighted average of all pixels
# Each token asks a question (its query q) that all tokens answer (with their key k). How well the two fit is a number,
# their score; softmax turns a token's scores into weights, and with these it averages what the tokens have to say
# (their values v). Weights that are not negative and sum to one keep every average between the smallest and the largest
# value of its channel. So however deep the network, attention doesn't make activations run away.
def attention_weights(q, k):
    """How much each token hears of each: queries and keys `(..., s, d)` to weights `(..., s, s)`, whose rows sum to 1.

    Vaswani et al. 2017, section 3.2.1.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # ... s s; section 4 says why they are divided
    return scores.softmax(dim=-1)


def show_average(out):
    print("\n3. A weighted average of all pixels")
    torch.manual_seed(0)
    x = nn.Conv2d(1, 16, 3, padding=1)(garment(9)).detach()  # n c h w
    tokens = to_tokens(x)  # n (h w) c
    q, k, v, projection = (nn.Linear(16, 16) for _ in range(4))
    weights = attention_weights(q(tokens), k(tokens))  # n (h w) (h w)
    values = v(tokens)  # n (h w) c
    averages = weights @ values  # n (h w) c
    y = x + to_image(projection(averages), x.shape[2])  # n c h w: what was heard is added to what was there
    steps = {"x": x, "tokens": tokens, "weights": weights, "averages": averages, "y": y}
    print("   " + " -> ".join(f"{name} {tuple(step.shape)}" for name, step in steps.items()))
    print(f"   smallest weight {weights.min():.1e}; a row's sum differs from 1 by {(weights.sum(-1) - 1).abs().max():.0e}")
    below, above = values.amin(1) - averages.amin(1), averages.amax(1) - values.amax(1)  # n c
    print(f"   averages lie within their channel's values: they exceed them by {torch.maximum(below, above).max():.1e}")
    raw = q(tokens) @ k(tokens).mT @ values
    print(f"   scores as weights, without softmax: {raw.abs().max() / values.abs().max():.0f} times the largest value")
    opened = attention_weights(tokens, tokens) @ tokens
    print(f"   the black box, opened: relative difference {relative_error(to_image(opened, 28), black_box(x)):.1e}")


if __name__ == "__main__":
    show_average(out)


# %% 4. What one pixel looks at
# Nothing has been trained here: the token of a pixel is the 5×5 patch around it, normalised, and query = key = token.
# Then those score highest that look alike, wherever they are.
def patch_tokens(picture, size=5):
    """The normalised patch around each pixel of `(n, 1, h, w)`: tokens `(n, h w, size²)`, with background outside."""
    padded = F.pad(picture, [size // 2] * 4, value=-1)
    patches = F.unfold(padded, size).mT  # n (h w) size²
    return F.layer_norm(patches, patches.shape[-1:])


def show_one_pixel(out):
    print("\n4. What one pixel looks at")
    row = 18
    figure, axes = plt.subplots(2, 4, figsize=(8, 4.6))
    for label, (top, bottom) in zip((1, 7, 9, 8), axes.T, strict=True):
        picture = garment(label)
        column = (picture[0, 0, row] > -0.5).int().argmax().item()  # the leftmost pixel of the garment in that row
        tokens = patch_tokens(picture)
        weights = attention_weights(tokens, tokens)[0, row * 28 + column].unflatten(0, (28, 28))
        far = weights[:, abs(torch.arange(28) - column) > 2].sum()
        print(f"   {load_test().classes[label % len(load_test().classes)]}: {far:.0%} of the weight lies more than 2 columns away")
        top.imshow(picture[0, 0])
        bottom.imshow(weights, cmap="gray_r")
        top.set_title(load_test().classes[label % len(load_test().classes)])
        bottom.set_title(f"largest weight {weights.max():.3f}", fontsize=9)
        for ax, color in ((top, "white"), (bottom, "black")):
            ax.plot(column, row, "o", color=color, markerfacecolor="none", markersize=10)
            ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("garment")
    axes[1, 0].set_ylabel("weights of the marked pixel")
    figure.suptitle(f"A pixel hears those that look like it, however far away ({load_test().name})")
    save_picture(figure, out / "04_one_pixel.png")


if __name__ == "__main__":
    show_one_pixel(out)


# %% 5. Why the scores are divided by sqrt(d)
# A score is a sum of d products. If queries and keys have variance 1, it has variance d: the wider the tokens, the
# farther apart the scores, until softmax gives all weight to one winner. Its gradient is then all but zero, and nothing
# can be learned any more.
def entropy(weights):
    """Of each row of weights `(..., s)`, in bits: 0 where one token has it all, log2(s) where all have the same."""
    return -torch.xlogy(weights, weights).sum(dim=-1) / math.log(2)


def show_spread(out):
    print("\n5. Why the scores are divided by sqrt(d), for 256 tokens")
    torch.manual_seed(0)
    dims = [4, 8, 16, 32, 64, 128, 256]
    spreads, entropies = [], []
    print("     d   spread of the scores   entropy of the weights   (undivided, divided)")
    for d in dims:
        q, k = torch.randn(2, 4, 256, d)  # n s d each
        scores = q @ k.mT  # n s s
        both = scores, scores / math.sqrt(d)
        spreads.append([s.std().item() for s in both])
        entropies.append([entropy(s.softmax(dim=-1)).mean().item() for s in both])
        print("   {:3d}       {:6.2f}  {:.2f}         {:4.2f} bits  {:.2f} bits".format(d, *spreads[-1], *entropies[-1]))

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
    labels = "spread of the scores (standard deviation)", "entropy of the weights (bits)"
    for ax, label, curves in zip(axes, labels, (spreads, entropies), strict=True):
        for curve, style, name in zip(zip(*curves, strict=True), ("o--", "s-"), ("undivided", "divided"), strict=True):
            ax.plot(dims, curve, style, color="black", label=name)
        ax.set(xlabel="width d of queries and keys", ylabel=label, xticks=dims, xticklabels=dims)
        ax.set_xscale("log", base=2, subs=[])
    axes[0].set_yscale("log", base=2)
    axes[1].axhline(8, color="gray", linewidth=1)
    axes[1].annotate("all 256 tokens alike", (4, 8.1), color="dimgray")
    axes[1].legend()
    figure.suptitle("Undivided, wide tokens leave softmax with one winner")
    save_picture(figure, out / "05_why_divide.png")


if __name__ == "__main__":
    show_spread(out)


# %% 6. A layer, with three projections and with one
def check_activations(x, channels):
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"expected activations (n, {channels}, h, w), at least one pixel, got {tuple(x.shape)}")


class SelfAttention(nn.Module):
    """Every pixel asks all pixels, and adds what it hears to itself. Activations `(n, c, h, w)` in and out.

    The norm comes first, as in every residual branch of these lessons: it sees to it that queries and keys have a
    variance near 1, however large the activations have grown. It is a group norm because that knows nothing of the
    other images in the batch (lesson 3).
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


def stack(*linears):
    """Several `nn.Linear` of the same input as one, which gives their outputs side by side: one large matrix product is
    faster than several small ones."""
    weight = torch.cat([linear.weight for linear in linears])  # (linears out) in
    stacked = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    stacked.load_state_dict({"weight": weight, "bias": torch.cat([linear.bias for linear in linears])})
    return stacked


def show_layer(out):
    print("\n6. A layer, with three projections and with one")
    torch.manual_seed(0)
    attention = SelfAttention(32, groups=4)
    x = torch.randn(2, 32, 8, 8)
    print(f"   {tuple(x.shape)} -> {tuple(attention(x).shape)}")
    qkv = stack(attention.q, attention.k, attention.v)
    tokens = to_tokens(attention.norm(x))
    q, k, v = qkv(tokens).chunk(3, dim=-1)  # n s (three c) -> three times n s c
    y = x + to_image(attention.proj(attention_weights(q, k) @ v), height=8)
    print(f"   one Linear for q, k and v, weights {tuple(qkv.weight.shape)}: {relative_error(y, attention(x)):.1e}")


if __name__ == "__main__":
    show_layer(out)


# %% 7. Several heads
# Softmax tends to pick one winner, so one attention looks at one place (section 8). Heads look at several: the channels
# are split, each part attends for itself, and the results are joined.
def split_heads(tokens, heads):
    """`(n, s, c)` to `(n, heads, s, d)`, where d is c / heads. Section 10 says the same with einops."""
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)  # n s (heads d) -> n s heads d -> n heads s d


def join_heads(tokens):
    """And back."""
    return tokens.transpose(1, 2).flatten(2)  # n heads s d -> n s heads d -> n s (heads d)


def to_pytorch_layout(rows, heads):
    """The lecture's order of the 3 c rows of the qkv weight or bias to PyTorch's, which is also ours.

    The lecture splits into heads before it separates q, k and v, so each head's three stand together.
    """
    return rearrange(rows, "(heads three d) ... -> (three heads d) ...", heads=heads, three=3)


class TokenSelfAttention(nn.Module):
    """Every token asks all tokens, in several heads at once. Tokens `(n, s, c)` in and out.

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
            raise ValueError(f"expected tokens (n, s, {channels}), s at least 1, got {tuple(tokens.shape)}")
        qkv = self.qkv(tokens)  # n s (three heads d)
        q, k, v = rearrange(qkv, "n s (three heads d) -> three n heads s d", three=3, heads=self.heads)
        if return_weights:
            weights = attention_weights(q, k)  # n heads s s
            heard = weights @ v  # n heads s d
        else:
            heard = F.scaled_dot_product_attention(q, k, v)  # the same, without ever holding all weights (section 11)
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


def show_heads(out):
    print("\n7. Several heads")
    torch.manual_seed(0)
    tokens = torch.randn(2, 64, 32)  # n s c
    split = split_heads(tokens, heads=4)
    print(f"   tokens {tuple(tokens.shape)} -> heads {tuple(split.shape)} -> joined {tuple(join_heads(split).shape)}")
    same = torch.equal(split, rearrange(tokens, "n s (heads d) -> n heads s d", heads=4))
    print(f"   with rearrange, exactly the same: {same}")

    attention = MultiHeadSelfAttention(32, heads=4, groups=4)
    x = torch.randn(2, 32, 8, 8)
    y, weights = attention(x, return_weights=True)
    print(f"   {tuple(x.shape)} -> {tuple(y.shape)}, weights {tuple(weights.shape)}")
    print(f"   fused kernel against explicit weights: {relative_error(attention(x), y):.1e}")

    names = [f"{part}{head}" for head in (1, 2) for part in "qkv"]  # as the lecture stacks the rows of two heads
    order = to_pytorch_layout(torch.arange(6), heads=2)
    print(f"   the lecture's rows {' '.join(names)} become PyTorch's {' '.join(names[i] for i in order)}")
    rows = torch.randn(96, 32)
    lecture = rearrange(tokens @ rows.mT, "n s (heads three d) -> three n heads s d", three=3, heads=4)
    ours = tokens @ to_pytorch_layout(rows, heads=4).mT
    ours = rearrange(ours, "n s (three heads d) -> three n heads s d", three=3, heads=4)
    print(f"   with the rows in that order, q, k and v are the same: {relative_error(ours, lecture):.1e}")


if __name__ == "__main__":
    show_heads(out)


# %% 8. What heads are for
# Each image has a left and a right ear, at random pixels. Every pixel has a pattern of six numbers; what is asked for,
# at each pixel, are the patterns of both ears. One head gives one average of the two: about half of the answer is lost,
# however it weighs them. (Not quite: the weights may depend on the patterns, and carry a little of one to the other. In
# ten times as many steps, one head brings its error down to 0.42.) Two heads look at one ear each.
def draw_ears(n, size=5, pattern=6):
    """Images `(n, pattern + 2, size, size)`, whose last two channels mark the ears, and the answers
    `(n, 2 * pattern)`."""
    patterns = torch.randn(n, pattern, size * size)  # n c (h w)
    places = torch.rand(n, size * size).topk(2).indices  # n ears: two different pixels
    marks = F.one_hot(places, size * size).float()  # n ears (h w)
    answers = patterns @ marks.mT  # n c ears
    return torch.cat([patterns, marks], dim=1).unflatten(2, (size, size)), answers.mT.flatten(1)


def train_ears(heads, steps=200, seed=0):
    """A model that looks for the ears, and its squared error at each step, in units of the variance of the patterns:
    1 says that it knows neither ear, 0 that it knows both."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(8, 24, 1), MultiHeadSelfAttention(24, heads), nn.Conv2d(24, 12, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    errors = []
    for _ in range(steps):
        images, answers = draw_ears(64)
        loss = F.mse_loss(model(images), answers[:, :, None, None].expand(-1, -1, 5, 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(loss.item())
    return model, errors


def show_ears(out):
    print("\n8. What heads are for: each pixel is asked for the patterns of two ears")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower on several
    trained = {heads: train_ears(heads) for heads in (1, 2)}
    torch.set_num_threads(threads)

    figure, (curves, *maps) = plt.subplots(1, 5, figsize=(10, 2.9), width_ratios=(2.2, 1, 1, 1, 1))
    torch.manual_seed(1)
    images, answers = draw_ears(1000)
    marks = images[:, -2:].flatten(2)  # n ears (h w)
    places = [divmod(mark.argmax().item(), 5) for mark in marks[0]]
    panels = [("the ears", marks[0].sum(0))]
    for (heads, (model, errors)), style in zip(trained.items(), ("--", "-"), strict=True):
        with torch.no_grad():
            error = (model(images) - answers[:, :, None, None]).square().mean()
            weights = model[1](model[0](images), return_weights=True)[1]  # n heads s s
        name = f"{heads} head{'s' if heads > 1 else ''}"
        print(f"   {name}: error on 1000 new images {error:.4f}")
        curves.semilogy(errors, style, color="black", label=f"{name}: {error:.2g}")
        shares = (weights.mean(dim=2) @ marks.mT).mean(dim=0)  # heads ears: of the weight of all pixels
        for head, (left, right) in enumerate(shares, 1):
            print(f"      head {head} gives the left ear {left:.0%} of its weight, the right one {right:.0%}")
            panels.append((f"{name}:\nhead {head}", weights[0, head - 1].mean(dim=0)))
    curves.set(xlabel="step of training", ylabel="error (1: knows nothing)")
    curves.legend(title="on new images")
    for ax, (title, panel) in zip(maps, panels, strict=True):
        ax.imshow(panel.unflatten(0, (5, 5)), cmap="gray_r", vmin=0, vmax=1)
        for name, (row, column) in zip("LR", places, strict=True):
            light = panel[5 * row + column] > 0.5
            ax.text(column, row, name, color="white" if light else "black", ha="center", va="center")
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=10)
    figure.suptitle("One head can't look at two ears at once; two heads can")
    save_picture(figure, out / "08_heads.png")


if __name__ == "__main__":
    show_ears(out)


# %% 9. Against PyTorch's own
def to_torch(attention):
    """PyTorch's class with a copy of our weights: tokens `(n, s, c)` in and out, without our norm and residual."""
    twin = nn.MultiheadAttention(attention.proj.in_features, attention.heads, batch_first=True)
    twin = twin.to(attention.qkv.weight).train(attention.training)  # the same type, on the same device
    twin.in_proj_weight.data.copy_(attention.qkv.weight)
    twin.in_proj_bias.data.copy_(attention.qkv.bias)
    twin.out_proj.load_state_dict(attention.proj.state_dict())
    return twin


# PyTorch's class expects (s, n, c) unless batch_first=True says otherwise. It can't see that it was given (n, s, c): it
# takes the images for tokens and the tokens for images. So each pixel attends to the same pixel of the other images.
def show_torch(out):
    print("\n9. Against PyTorch's own")
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        attention = TokenSelfAttention(32, heads=4).to(dtype)
        twin = to_torch(attention)
        tokens = torch.randn(3, 64, 32, dtype=dtype, requires_grad=True)  # n s c
        results = attention(tokens), twin(tokens, tokens, tokens)[0]
        gradients = [torch.autograd.grad(result.square().sum(), tokens)[0] for result in results]
        errors = relative_error(*results), relative_error(*gradients)
        print("   {}: outputs differ by {:.1e}, gradients by {:.1e}".format(dtype, *errors))

    careless = nn.MultiheadAttention(32, num_heads=4)
    careless.load_state_dict(twin.state_dict())
    changed = tokens.detach().clone()
    changed[1] += 1  # another image of the batch
    for name, model in (("with batch_first=True", twin), ("without", careless)):
        before, after = model(tokens, tokens, tokens)[0], model(changed, changed, changed)[0]
        print(
            f"   {name}: {tuple(tokens.shape)} -> {tuple(before.shape)}, differs from ours by "
            f"{relative_error(before, results[0]):.1e}; "
            f"changing image 1 changes image 0 by {relative_error(after[0], before[0]):.1e}"
        )


if __name__ == "__main__":
    show_torch(out)
