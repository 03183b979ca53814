"""Lesson 2: pixels look at each other.

A convolution sees a neighbourhood. Attention gives each pixel a weighted average of all pixels, with weights that
depend on what the pixels contain (Vaswani et al. 2017; lecture section "self-attention").

    python 02_attention.py [--out DIR]
"""

import math
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange
from torch import nn

import lesson_tools as tools


# %% 1. Why: the rabbit's ear
# One ear of a rabbit is brown. How does the other ear, on the far side of the image, get the same brown? Each 3×3
# convolution carries it just one pixel farther. The input pixels that an output pixel depends on are its receptive
# field. The gradient shows them: outside the field, it is exactly zero. (There is no rabbit in our data, so we take a
# pixel inside a garment.)
#
# Comments give shapes in einops notation: n images, c channels, h rows, w columns; (h w) is a single axis.
def input_gradient(layer, x, row, column):
    """How much a pixel of `layer(x)` depends on each pixel of x `(n, c, h, w)`: the gradient's magnitude, `(h, w)`."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[:, :, row, column].sum(), x)
    return gradient.abs().sum(dim=(0, 1))


@tools.section
def show_reach():
    torch.manual_seed(0)
    images, _, name = tools.load_one_of_each()
    x = nn.Conv2d(1, 16, 1)(images[-1:])  # n c h w
    convolutions = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(14)]
    pictures, titles = [images[-1]], ["the image"]
    for n in (1, 2, 6, 14):
        gradient = input_gradient(nn.Sequential(*convolutions[:n]), x, 16, 14)
        seen = gradient.count_nonzero().item()
        print(f"   {n} convolution(s): the output pixel depends on {seen} of {gradient.numel()} pixels")
        pictures.append((gradient / gradient.max()).log10().clamp(min=-6)[None] / 3 + 1)  # a millionth is black
        titles.append(f"{n} layer{'s' * (n > 1)}\n{seen} px")
    title = f"3×3 convolutions see one pixel farther per layer\ngradient of one output pixel, log scale; {name}"
    return tools.plot_grid(title, torch.stack(pictures), 5, titles=titles)


# %% 2. Attention: the original value plus a weighted average
# Attention works on a sequence of tokens. Each token is a vector, and three linear layers turn it into a query (what it
# looks for), a key (what it offers) and a value (what it hands over). The dot product of a query and a key, the score,
# says how well they match. Softmax turns a token's scores into weights, and the token adds the weighted average of all
# values to itself: "the original value plus a weighted average", as the lecture puts it.
#
#     softmax(Q Kᵀ / √d) V        Q, K, V: s rows, one for each token, d wide; `.mT` swaps the last two axes
def attention_weights(q, k):
    """Queries and keys `(..., s, d)` to weights `(..., s, s)`: row i says how much token i attends to each token, and
    sums to 1 (Vaswani et al. 2017, section 3.2.1)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # ... s s; section 6 says why we divide
    return scores.softmax(dim=-1)


def attention(q, k, v):
    """A weighted average of all values for each token: queries, keys and values `(..., s, d)` to `(..., s, d)`."""
    return attention_weights(q, k) @ v


# Three tokens, each with four numbers that say how much ear, grass, brown and green it contains. Both ears offer "ear",
# but only the left one has a colour. So the right ear's query asks for an ear with a colour, and most of its average
# comes from the left one. (We chose these projections by hand. A layer learns its own.)
TOKENS, FEATURES = ("left ear", "right ear", "grass"), ("ear", "grass", "brown", "green")
X = torch.tensor([[2.0, 0, 2, 0], [2, 0, 0, 0], [0, 2, 0, 2]])  # s d
TO_Q = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [0, 0, -1, 0], [0, 0, -1, 0]])  # third column: is a colour missing?
TO_K = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]])  # third column: is there a colour?
TO_V = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # the colour


@tools.section
def show_tokens():
    q, k, v = X @ TO_Q, X @ TO_K, X @ TO_V
    scores, weights, averages = q @ k.T / 2, attention_weights(q, k), attention(q, k, v)
    steps = {"x": X, "Q": q, "K": k, "V": v, "Q Kᵀ / √4": scores, "softmax": weights, "averages": averages}
    for name, matrix in (steps | {"x + averages": X + averages}).items():
        print(f"   {name:12}", " | ".join(" ".join(f"{value:.3f}" for value in row) for row in matrix.tolist()))
    figure, (above, below) = plt.subplots(2, 4, figsize=(12, 5.4))
    asked = ("ear", "grass", "colour", "")
    tools.plot_matrix(above[0], X, "tokens x", TOKENS, FEATURES)
    tools.plot_matrix(above[1], q, "queries Q: what they look for", columns=asked, cmap="Purples")
    tools.plot_matrix(above[2], k, "keys K: what they offer", columns=asked, cmap="Oranges")
    tools.plot_matrix(above[3], v, "values V: what they hand over", columns=FEATURES, cmap="Blues")
    tools.plot_matrix(below[0], scores, "scores Q Kᵀ / √d, d = 4", TOKENS, TOKENS, cmap="Purples")
    tools.plot_matrix(below[1], weights, "weights softmax(Q Kᵀ / √d)", columns=TOKENS, cmap="Oranges", digits=3)
    tools.plot_matrix(below[2], averages, "averages: weights · V", columns=FEATURES, cmap="Blues", digits=2)
    tools.plot_matrix(below[3], X + averages, "x + averages", columns=FEATURES, digits=2)
    figure.suptitle("Attention gives the right ear the left ear's colour", fontsize=15)
    return figure


# %% 3. Why softmax
# Why not use the scores themselves as weights? They can have any sign and size. Softmax's weights are positive and sum
# to one, so each average stays within the range of the values. (Layer after layer, tokens can still grow. But each
# layer starts with a norm (section 7), so what it adds doesn't scale with x, and growth isn't exponential.)
@tools.section
def show_average():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 64, 16)  # s d, each
    weights, averages = attention_weights(q, k), attention(q, k, v)  # s s; s d
    sums = (q @ k.mT / math.sqrt(16)) @ v  # s d
    print(f"   q, k, v {tuple(q.shape)} -> weights {tuple(weights.shape)} -> averages {tuple(averages.shape)}")
    print(f"   rows sum to one within {(weights.sum(dim=-1) - 1).abs().max():.0e}; smallest weight {weights.min():.0e}")
    for name, part in {"values": v, "averages": averages, "sums weighted by the raw scores": sums}.items():
        print(f"   channel 0 of the {name}: from {part[:, 0].min():.1f} to {part[:, 0].max():.1f}")


# %% 4. An image is a sequence of pixels
# The lecture flattens an image: each pixel becomes a token, row by row.
def pixel_attention(x):
    """Attention between the pixels of `(n, c, h, w)`, with the pixels themselves as queries, keys and values."""
    tokens = x.flatten(2).mT  # n c h w -> n c (h w) -> n (h w) c
    averages = attention(tokens, tokens, tokens)  # n (h w) c
    return averages.mT.unflatten(2, x.shape[2:])  # n c h w


# For a first look, nothing has to be learned. Let a pixel's token be the 5×5 patch around it, and query = key = token:
# patches that look alike get the highest scores, wherever they are (compare non-local means, Buades et al. 2005). We
# normalise the patches first, or the one with the largest numbers would always win. A patch of constant brightness
# becomes zero: all its scores are equal, so it attends evenly to everything.
def patch_tokens(images):
    """The normalised patch around each pixel of `(n, 1, h, w)`, padded with background: tokens `(n, h w, 25)`."""
    patches = F.unfold(F.pad(images, [2] * 4, value=-1), 5).mT  # n (h w) 25
    return F.layer_norm(patches, patches.shape[-1:])


@tools.section
def show_one_pixel():
    images, classes, name = tools.load_one_of_each()
    x, row, columns = nn.Conv2d(1, 16, 1)(images[-1:]), 18, torch.arange(28)
    seen = input_gradient(pixel_attention, x, 16, 14).count_nonzero().item()
    print(f"   one layer of attention: an output pixel depends on {seen} of 784 pixels")
    flat = (patch_tokens(images).abs().amax(dim=-1) < 1e-3).float().mean()
    print(f"   {flat:.0%} of all patches are flat")
    figure, axes = plt.subplots(2, 4, figsize=(8, 4.7))
    for i, (above, below) in zip((1, 4, 6, 7), axes.T, strict=True):
        label = i % len(classes)  # other data may have fewer
        column = (images[label, 0, row] > -0.5).int().argmax().item()  # where the garment begins in this row
        tokens = patch_tokens(images[label, None])
        weights = attention_weights(tokens, tokens)[0, row * 28 + column].unflatten(0, (28, 28))  # h w
        distant = (columns - column).abs() > 5
        share, even = weights[:, distant].sum(), distant.float().mean()
        print(f"   {classes[label]}: {share:.0%} of the weight is over five columns away, beyond the reach", end=" ")
        print(f"of an 11 × 11 convolution (uniform weights: {even:.0%})")
        tools.plot_image(above, images[label, 0], classes[label])
        tools.plot_image(below, weights, f"{share:.0%} over 5 columns away\n(uniform: {even:.0%})", cmap="gray_r")
        for axis, color in ((above, "white"), (below, "black")):
            axis.plot(column, row, "o", color=color, markerfacecolor="none", markersize=10)
    tools.set_title(figure, f"The marked pixel attends to lookalikes, near and far\n{name}")
    return figure


# %% 5. What flattening loses
# Attention comes from language processing, where tokens really form a sequence. Flattening an image into one is a hack,
# as the lecture says. Attention can't see which pixels were neighbours, because it is permutation-equivariant: if you
# permute its input, its output is permuted in the same way, and nothing else changes.
#
# A U-Net can live with that, because its convolutions have already mixed each pixel with its neighbours. A transformer
# (section 14) needs a positional encoding, such as a learned vector for each position.
def permute_pixels(x, order):
    """Pixel i of the result is pixel order[i] of x `(n, c, h, w)`, counted row by row."""
    return x.flatten(2)[:, :, order].unflatten(2, x.shape[2:])


def relative_error(result, expected):
    """The largest difference anywhere, in units of the largest expected value."""
    return ((result - expected).abs().max() / expected.abs().max()).item()


@tools.section
def show_shuffled_pixels():
    torch.manual_seed(0)
    images, _, name = tools.load_one_of_each()
    x = nn.Conv2d(1, 8, 1)(images[-1:]).detach().double()  # n c h w: eight channels, made pixel by pixel
    order, pictures = torch.randperm(28 * 28), []
    layers = {"attention": pixel_attention, "convolution": nn.Conv2d(8, 8, 3, padding=1).double()}
    for kind, layer in layers.items():
        plain, shuffled = layer(x).detach(), layer(permute_pixels(x, order)).detach()
        restored = permute_pixels(shuffled, order.argsort())
        print(f"   {kind}, shuffled and put back in order: relative difference {relative_error(restored, plain):.0e}")
        low, high = plain[0, 0].min(), plain[0, 0].max()
        pictures += [2 * (part[0, :1] - low) / (high - low) - 1 for part in (plain, shuffled, restored)]
    titles = ("output", "output for\nshuffled pixels", "put back\nin order")
    title = f"Attention can't tell neighbours from strangers\n{name}"
    return tools.plot_grid(title, torch.stack(pictures), 3, list(layers), titles)


# %% 6. Why the scores are divided by √d
# A score is a sum of d products. If the entries of queries and keys are independent, with mean 0 and variance 1, the
# sum has variance d: the larger d is, the farther apart the scores, until softmax gives nearly all the weight to one
# winner. A row that is nearly one-hot (all weight on one token) gets almost no gradient, so training can hardly undo a
# random choice; the other rows get far larger gradients. With the division, no row is one-hot, and weights and the
# scores' gradients are about the same for every d.
@tools.section
def show_division():
    torch.manual_seed(0)
    dims, largest = (4, 8, 16, 32, 64, 128, 256), {"undivided": [], "divided by √d": []}
    for d in dims:
        q, k = torch.randn(2, 256, d)  # s d, each
        for name, scores in zip(largest, (q @ k.mT, q @ k.mT / math.sqrt(d)), strict=True):
            weights = scores.softmax(dim=-1)  # s s
            largest[name].append(weights.amax(dim=-1).mean())
            mean = largest[name][-1]
            print(f"   d {d:3} {name:14} scores ± {scores.std():5.2f}, largest weight {mean:.2f}")
    title = "If d is large, undivided scores favour a single token"
    labels = {"xscale": "log", "xlabel": "width d", "ylabel": "largest weight (mean of 256 rows)", "ylim": (0, 1)}
    return tools.plot_curves(title, dims, largest, **labels)


# %% 7. A layer
# A layer starts with a group norm, so that scores don't grow with x (section 2 of 03 says why not batch norm). Three
# learned projections of the same tokens, hence *self*-attention, give queries, keys and values. Then come attention, an
# output projection and a residual connection.
class SelfAttention(nn.Module):
    """Every pixel attends to all pixels, and adds the average to itself. Activations `(n, c, h, w)` in and out (Ho et
    al. 2020, appendix B)."""

    def __init__(self, channels, groups=1):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).mT  # n c h w -> n (h w) c
        attended = attention(self.q(tokens), self.k(tokens), self.v(tokens))  # n (h w) c, with weights n (h w) (h w)
        return x + self.proj(attended).mT.unflatten(2, x.shape[2:])  # n c h w


# Three projections of the same tokens are one projection with three times as many outputs; `chunk` cuts the result into
# three. One large matrix product keeps the hardware busier than three small ones, so we do this from section 10 on.
#
# Like the lecture, we print the output's standard deviation. In a new layer, scores are small, so weights are nearly
# uniform. Our random pixels are independent, so their average varies much less than they do (what is left is mostly
# biases). The branch therefore adds little, and the output nearly equals the input. (In a real image, channels have
# nonzero means, which averaging keeps, so the branch adds more: nearly the same vector to every pixel.)
@tools.section
def show_layer():
    torch.manual_seed(0)
    layer, x = SelfAttention(32, groups=4), torch.randn(2, 32, 16, 16)
    tokens = layer.norm(x).flatten(2).mT  # n (h w) c
    parts = (layer.q, layer.k, layer.v)
    weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    q, k, v = F.linear(tokens, weight, bias).chunk(3, dim=-1)  # n (h w) (three c) -> n (h w) c, three times
    error = relative_error(v, layer.v(tokens))
    print(f"   v from one projection {tuple(weight.shape)} instead of three: off by {error:.0e}")
    averages = attention(q, k, v)
    steps = {"x": x, "values": v, "averages": averages, "projected": layer.proj(averages), "x + projected": layer(x)}
    print("   standard deviations: " + ", ".join(f"{name} {step.std():.2f}" for name, step in steps.items()))


# %% 8. Several heads, by hand
# One set of weights gives a token one average; several heads give it several. Each head has its own queries, keys and
# values, d = c / heads wide, projected from *all* channels, and the averages are concatenated. This takes the lecture
# two more lines of code: one folds the heads into the batch, as if each head were an image; the other unfolds them.
def heads_to_batch(tokens, heads):
    """`(n, s, c)` to `(n heads, s, c / heads)`."""
    n, s, c = tokens.shape
    # n s c -> n s heads d -> n heads s d -> (n heads) s d
    return tokens.view(n, s, heads, c // heads).transpose(1, 2).reshape(n * heads, s, c // heads)


def batch_to_heads(tokens, heads):
    """The inverse of `heads_to_batch`: `(n heads, s, d)` to `(n, s, heads d)`."""
    folded, s, d = tokens.shape
    # (n heads) s d -> n heads s d -> n s heads d -> n s (heads d)
    return tokens.view(folded // heads, heads, s, d).transpose(1, 2).reshape(folded // heads, s, heads * d)


@tools.section
def show_heads():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 64, 32)  # n s c, each: stand-ins for projected tokens
    folded = attention(*(heads_to_batch(part, 4) for part in (q, k, v)))  # (n heads) s d
    joined = batch_to_heads(folded, 4)  # n s (heads d)
    print(f"   q {tuple(q.shape)} -> {tuple(heads_to_batch(q, 4).shape)}; averages {tuple(folded.shape)}", end=" ")
    print(f"-> {tuple(joined.shape)}")
    third = slice(16, 24)  # the channels of the third head
    alone = attention(q[..., third], k[..., third], v[..., third])
    print(f"   the third head by itself: off by {relative_error(joined[..., third], alone):.0e}")


# %% 9. rearrange
# To read `view(...).transpose(1, 2).reshape(...)`, you have to count axes in your head: `view` splits them by size, and
# `transpose` swaps them by number. `rearrange` names them, so you can read it, and it can check its input.
#
# Brackets on the left split an axis (give the sizes of all its parts but one); brackets on the right join axes. The
# last name in brackets varies fastest. Each example: an input shape, the arguments of `rearrange`, the same by hand.
TOKEN_SHAPE, IMAGE_SHAPE = (2, 64, 32), (2, 32, 8, 8)
EXAMPLES = [
    (TOKEN_SHAPE, "n s c -> n c s", {}, lambda x: x.transpose(1, 2)),
    (TOKEN_SHAPE, "n s (heads d) -> (n heads) s d", {"heads": 4}, lambda x: heads_to_batch(x, 4)),
    (IMAGE_SHAPE, "n c h w -> n (h w) c", {}, lambda x: x.flatten(2).transpose(1, 2)),
    (TOKEN_SHAPE, "n (h w) c -> n c h w", {"h": 8}, lambda x: x.transpose(1, 2).reshape(2, 32, 8, 8)),
    (
        IMAGE_SHAPE,
        "n c (h p1) (w p2) -> n (h w) (p1 p2 c)",
        {"p1": 4, "p2": 4},
        lambda x: x.view(2, 32, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, 512),
    ),
]


@tools.section
def show_rearrange():
    for shape, pattern, sizes, by_hand in EXAMPLES:
        x = torch.randn(shape)
        y = rearrange(x, pattern, **sizes)
        print(f"   {pattern}: {shape} -> {tuple(y.shape)}, the same by hand: {torch.equal(y, by_hand(x))}")
    try:
        rearrange(torch.zeros(TOKEN_SHAPE), "n s (heads d) -> (n heads) s d", heads=5)
    except EinopsError as error:
        print(f"   32 channels, 5 heads: {str(error).splitlines()[-1].strip()}")
    images, _, name = tools.load_one_of_each()
    tokens = rearrange(images[:6, 0], "n h w -> (h w) n")
    n = tokens.shape[1]
    pictures = torch.cat([rearrange(tokens, "(h w) n -> n h w", h=28), tokens.reshape(n, 28, 28)])[:, None]
    title = f"reshape scrambles the pixels, without an error\nfrom (h w) n to n h w; {name}"
    return tools.plot_grid(title, pictures, n, ["rearrange", "reshape"])


# %% 10. The layer with heads
# The heads can also keep an axis of their own: matrix multiplication treats all axes before the last two as a batch.
# (The lecture splits off the heads before q, k and v, so the rows of its weight matrix are ordered differently.)
class MultiHeadSelfAttention(nn.Module):
    """Every token attends to all tokens, in several heads at once. Tokens `(n, s, c)` in and out, no norm, no residual.

    channels: c. heads: how many, each `channels // heads` wide. attention_fn: turns q, k and v into averages; section
    13 has a leaner one. Raises ValueError if heads doesn't divide channels. (Vaswani et al. 2017, section 3.2.2;
    lecture section "multi-head attention".)
    """

    def __init__(self, channels, heads, attention_fn=attention):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"the number of heads must divide the channels, got {heads} heads, {channels} channels")
        self.heads, self.attention_fn = heads, attention_fn
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def split(self, tokens):
        """Queries, keys and values, `(n, heads, s, d)` each."""
        return rearrange(self.qkv(tokens), "n s (three heads d) -> three n heads s d", three=3, heads=self.heads)

    def weights(self, tokens):
        """`(n, heads, s, s)`: row i says how much token i attends to every token."""
        q, k, _ = self.split(tokens)
        return attention_weights(q, k)

    def forward(self, tokens):
        averages = self.attention_fn(*self.split(tokens))  # n heads s d
        return self.proj(rearrange(averages, "n heads s d -> n s (heads d)"))


class AttentionBlock(nn.Module):
    """Multi-head attention between pixels, with norm and residual: activations `(n, c, h, w)` in and out.

    groups: how many the group norm has. Raises ValueError if heads or groups don't divide channels.
    """

    def __init__(self, channels, heads, groups=1, attention_fn=attention):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.attention = MultiHeadSelfAttention(channels, heads, attention_fn)

    def forward(self, x):
        attended = self.attention(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        return x + rearrange(attended, "n (h w) c -> n c h w", h=x.shape[2])

    def weights(self, x):
        """`(n, heads, h w, h w)`: row i says how much pixel i attends to each pixel."""
        return self.attention.weights(rearrange(self.norm(x), "n c h w -> n (h w) c"))


@tools.section
def show_block():
    torch.manual_seed(0)
    layer, tokens = MultiHeadSelfAttention(32, heads=4), torch.randn(2, 64, 32)
    q, _, _ = layer.split(tokens)  # n heads s d
    print(f"   tokens {tuple(tokens.shape)} -> q {tuple(q.shape)} -> weights {tuple(layer.weights(tokens).shape)}")
    folded = (heads_to_batch(part, 4) for part in layer.qkv(tokens).chunk(3, dim=-1))
    by_hand = layer.proj(batch_to_heads(attention(*folded), 4))
    print(f"   heads folded into the batch, as in section 8: off by {relative_error(by_hand, layer(tokens)):.0e}")
    x = torch.randn(2, 32, 8, 8)
    print(f"   for pixels: {tuple(x.shape)} -> {tuple(AttentionBlock(32, heads=4, groups=4)(x).shape)}")


# %% 11. What heads are for
# A toy task: every pixel of an image holds a pattern of six numbers, and two pixels, at random positions, are marked as
# the left and the right ear. Every pixel must output both ears' patterns, the left ear's first. With one head, a pixel
# gets one average. The values are linear in the pixel, so an average of both ears mixes their patterns in the same
# channels. If it mixes them or drops one, about half the answer is lost. With two heads, each can attend to one ear.
#
# One head fails only because the values are linear in the pixel. With a nonlinear layer in front, each ear could get
# channels of its own: with 96 hidden channels, one of two runs learned that in 1,000 steps (error 0.002; the other,
# 0.49). With two heads, seven of eight runs learned the task in only 200.
SIDE, PATTERN = 5, 6


def make_ears(n):
    """Images `(n, 6 + 2, 5, 5)`, whose last two channels mark the left and the right ear, and answers `(n, 2 * 6)`."""
    patterns = torch.randn(n, PATTERN, SIDE**2)  # n c (h w)
    positions = torch.rand(n, SIDE**2).topk(2).indices  # n ears: two different pixels
    marks = F.one_hot(positions, SIDE**2).float()  # n ears (h w)
    images = torch.cat([patterns, marks], dim=1).unflatten(2, (SIDE, SIDE))  # n c h w
    return images, (marks @ patterns.mT).flatten(1)  # n ears c -> n (ears c)


def ear_error(model, images, answers):
    """Mean squared error over all pixels: 0 for perfect answers, 1 for all zeros (the patterns have variance 1)."""
    return (model(images) - answers[:, :, None, None]).square().mean()


def train_ears(heads, steps=200):
    """A model trained to output the patterns of both ears at every pixel."""
    torch.manual_seed(0)
    layers = nn.Conv2d(PATTERN + 2, 24, 1), AttentionBlock(24, heads), nn.Conv2d(24, 2 * PATTERN, 1)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(steps):
        error = ear_error(model, *make_ears(64))
        optimizer.zero_grad()
        error.backward()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        optimizer.step()
    return model.requires_grad_(False)


@tools.section
def show_ears():
    images, answers = make_ears(1000)
    marks = images[:, -2:].flatten(2)  # n ears (h w)
    panels = {"the two ears": marks[0].sum(dim=0)}
    for heads in (1, 2):
        model = train_ears(heads)
        weights = model[1].weights(model[0](images)).mean(dim=2)  # n heads (h w): the mean over all queries
        shares = (weights @ marks.mT).mean(dim=0)  # heads ears
        print(f"   {heads} head(s): error {ear_error(model, images, answers):.3f} on 1000 new images")
        for head, (left, right) in enumerate(shares, 1):
            print(f"      head {head} gives {left:.0%} of its weight to the left ear, {right:.0%} to the right one")
            panels[f"head {head} of {heads}"] = weights[0, head - 1]
    pictures = torch.stack(list(panels.values())).view(-1, 1, SIDE, SIDE)  # weights, from 0 to 1
    title = "One linear head can't keep two ears apart; two can"
    return tools.plot_grid(title, 2 * pictures - 1, 4, titles=list(panels))


# %% 12. Against PyTorch's own
def to_torch_mha(layer):
    """PyTorch's `nn.MultiheadAttention` with a copy of the weights of our MultiHeadSelfAttention."""
    twin = nn.MultiheadAttention(layer.proj.in_features, layer.heads, batch_first=True)
    twin = twin.to(layer.qkv.weight)  # the same dtype and device
    state = {f"in_proj_{name}": parameter for name, parameter in layer.qkv.state_dict().items()}
    state |= {f"out_proj.{name}": parameter for name, parameter in layer.proj.state_dict().items()}
    twin.load_state_dict(state)
    return twin


# PyTorch's class expects (s, n, c) unless batch_first=True says otherwise. Given (n, s, c), it can't notice the
# mistake: it takes images for tokens and tokens for images, so each pixel attends to the same pixel of all images.
@tools.section
def show_torch():
    torch.manual_seed(0)
    layer, tokens = MultiHeadSelfAttention(32, heads=4), torch.randn(3, 64, 32)  # n s c
    twin, careless = to_torch_mha(layer), nn.MultiheadAttention(32, num_heads=4)
    careless.load_state_dict(twin.state_dict())
    changed = tokens.clone()
    changed[1] += 1
    for name, model in {"with batch_first=True": twin, "without": careless}.items():
        result, after = (model(x, x, x)[0] for x in (tokens, changed))  # takes q, k and v; [1] would be the weights
        error = relative_error(result, layer(tokens))
        print(f"   {name}: {tuple(tokens.shape)} -> {tuple(result.shape)}, off by {error:.0e};")
        print(f"      a change to image 1 changes image 0 by {relative_error(after[0], result[0]):.0e}")


# %% 13. The fused kernel, and where to put attention
# Every pixel attends to every pixel, so twice the side means four times the tokens and sixteen times the attention
# weights. Those of one image take 4 · heads · pixels² bytes in float32: 537 MB for 64 × 64 pixels and 8 heads. A fused
# kernel, one routine for the whole formula (Dao et al. 2022), computes a block of weights, uses it, forgets it, and
# computes it again for the backward pass. It never holds them all, and is faster for large images: memory is slow.
#
# But every pixel still meets every pixel, so the kernel's time grows in the same way. That is why many U-Nets have
# attention at low resolutions only, where a pixel also stands for a whole region.
def fused_attention(q, k, v):
    """`F.scaled_dot_product_attention`, but never in bfloat16 on a CPU: its backward pass is several times as slow."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
    return F.scaled_dot_product_attention(q, k, v)


def measure_seconds(layers, x, enough=0.5):
    """Seconds for a forward and backward pass of each layer: the fastest of 2 to 20 rounds, as many as fit into
    `enough` seconds. The fastest, because whatever else the machine is doing can only add time."""
    rounds = []  # the layers take turns, so a disturbance doesn't always hit the same one
    began = time.perf_counter()
    while len(rounds) < 2 or (len(rounds) < 20 and time.perf_counter() - began < enough):
        times = [time.perf_counter()]
        for layer in layers:
            layer(x).sum().backward()
            if x.is_cuda:
                torch.cuda.synchronize()  # wait until the GPU is done
            times.append(time.perf_counter())
        rounds.append(np.diff(times))
    return np.min(rounds, axis=0).tolist()


def saved_bytes(layer, x, *inputs):
    """Bytes that autograd keeps for the backward pass of `layer(x, *inputs)`, for one image, without the parameters."""
    x = x[:1].detach().clone().requires_grad_()
    kept = {}  # by address: several views of one tensor count once

    def keep(tensor):  # autograd calls this for each tensor it saves
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, *inputs)
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def cost_layers(channels=64, heads=8):
    """The layers to compare: attention by hand, fused attention, and a convolution."""
    by_hand, fused = (AttentionBlock(channels, heads, attention_fn=kind) for kind in (attention, fused_attention))
    return {"by hand": by_hand, "fused": fused, "3×3 convolution": nn.Conv2d(channels, channels, 3, padding=1)}


SIDES = (8, 16, 32, 64)


@tools.section
def show_cost():
    device = tools.choose_device("auto")
    layers = {name: layer.to(device) for name, layer in cost_layers().items()}
    seconds, kept = ({name: [] for name in layers} for _ in range(2))
    print("   one image, 64 channels, 8 heads: milliseconds forward and backward; megabytes kept for the backward pass")
    for side in SIDES:
        n = max(1, 512 // side**2)  # several small images: one is too quick to measure
        x = torch.randn(n, 64, side, side, device=device, requires_grad=True)
        for name, value in zip(layers, measure_seconds(layers.values(), x), strict=True):
            seconds[name].append(1000 * value / n)
            kept[name].append(saved_bytes(layers[name], x) / 1e6)
        cells = ", ".join(f"{name} {seconds[name][-1]:.2f} ms {kept[name][-1]:.2f} MB" for name in layers)
        print(f"   {side:2} × {side:2}: {cells}")
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
    for axis, lines, label in zip(axes, (seconds, kept), ("milliseconds", "megabytes kept"), strict=True):
        tools.plot_lines(axis, SIDES, lines, xlabel="image side (pixels)", ylabel=label, xscale="log", yscale="log")
    ratios = ", ".join(f"{name} × {values[-1] / values[-2]:.0f}" for name, values in seconds.items())
    subtitle = f"time from {SIDES[-2]} to {SIDES[-1]} pixels a side: {ratios}"
    tools.set_title(figure, f"Doubling the side slows attention more than convolution\n{subtitle}")
    return figure


# %% 14. Transformers
# Attention carries information from token to token; then a small network, the same for all tokens, processes each token
# separately. Alternate the two, each with a norm and a residual, and you have a transformer. Its LayerNorm normalises
# each token by itself. The lecture suggests a stack of such blocks for the middle of a U-Net, with pixels as tokens.
# Ours computes the same function as PyTorch's `nn.TransformerEncoder`.
class TransformerBlock(nn.Module):
    """Tokens `(n, s, c)` in and out. Raises ValueError if heads doesn't divide channels.

    Norm first (Dosovitskiy et al. 2021, section 3.1).
    """

    def __init__(self, channels, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = MultiHeadSelfAttention(channels, heads, fused_attention)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, tokens):
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


def to_torch_encoder(blocks):
    """PyTorch's `nn.TransformerEncoder` with the weights of a list of our TransformerBlocks."""
    heads, channels = blocks[0].attention.heads, blocks[0].norm1.normalized_shape[0]
    options = {"dropout": 0, "activation": "gelu", "batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(channels, heads, 4 * channels, **options)
    twin = nn.TransformerEncoder(layer, len(blocks), enable_nested_tensor=False)
    for theirs, ours in zip(twin.layers, blocks, strict=True):
        theirs.self_attn, theirs.norm1, theirs.norm2 = to_torch_mha(ours.attention), ours.norm1, ours.norm2
        theirs.linear1, _, theirs.linear2 = ours.mlp
    return twin


class VisionTransformer(nn.Module):
    """Images `(n, channels_in, size, size)` to class logits `(n, n_classes)`.

    A token is a patch of `patch × patch` pixels; its learned positional encoding says where it is. Dosovitskiy et al.
    2021 classify the output of an extra token; we classify the mean over all patches. Raises ValueError if patch
    doesn't divide size, or heads doesn't divide channels.
    """

    def __init__(self, size=28, patch=4, channels=64, depth=4, heads=4, n_classes=10, channels_in=1):
        super().__init__()
        if patch < 1 or size % patch:
            raise ValueError(f"the patch side must divide the image side, got {patch} and {size}")
        self.patch = patch
        self.embed = nn.Linear(channels_in * patch**2, channels)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, channels))  # s c
        self.blocks = nn.Sequential(*(TransformerBlock(channels, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels)
        self.classify = nn.Linear(channels, n_classes)

    def to_patches(self, x):
        """`(n, channels_in, size, size)` to `(n, s, patch * patch * channels_in)`."""
        return rearrange(x, "n c (h p1) (w p2) -> n (h w) (p1 p2 c)", p1=self.patch, p2=self.patch)

    def encode(self, x):
        """The transformer's output for each patch, `(n, s, c)`."""
        tokens = self.embed(self.to_patches(x)) + self.positions  # n s c
        return self.norm(self.blocks(tokens))

    def forward(self, x):
        return self.classify(self.encode(x).mean(dim=1))  # n s c -> n c -> n n_classes


# The model has 49 learned position vectors, one for each patch of a 28 × 28 image. A 32 × 32 image has 64 patches, so
# the model fails, with the error below.
#
# A convolution knows from the start that neighbours belong together; a transformer has to learn it from data. So it is
# pre-trained: with 300 million labelled images it beat the convolutional nets of its day (Dosovitskiy et al. 2021). It
# can also learn without labels, by filling in hidden patches (Xie et al. 2022).
#
# With 600 to 9,600 labelled images of Fashion-MNIST, ours (patches of 7 × 7 pixels) falls behind a convolutional net of
# the same size. Pre-training it on all 60,000, without labels, closes seven tenths of the gap at 600, and about half at
# 2,400 and 9,600 (three seeds; docs/data_efficiency.png, drawn by tests/measure_data_efficiency.py).
@tools.section
def show_transformer():
    torch.manual_seed(0)
    model, image = VisionTransformer().requires_grad_(False), tools.load_one_of_each()[0][-1:]  # n c h w
    patches = model.to_patches(image)
    steps = {"image": image, "patches": patches, "tokens": model.embed(patches), "logits": model(image)}
    print("   " + " -> ".join(f"{name} {tuple(step.shape)}" for name, step in steps.items()))
    shuffled = patches[:, torch.randperm(patches.shape[1])]
    shuffled = rearrange(shuffled, "n (h w) (p1 p2 c) -> n c (h p1) (w p2)", h=7, p1=4, p2=4)
    print(f"   shuffling the patches changes the logits by {relative_error(model(shuffled), model(image)):.0e}")
    model.positions.zero_()
    print(f"   without position vectors, only by {relative_error(model(shuffled), model(image)):.0e}")
    try:
        model(F.pad(image, [2] * 4))
    except RuntimeError as error:
        print(f"   32 × 32 pixels: {error}")
    pixels = rearrange(torch.randn(2, 32, 7, 7), "n c h w -> n (h w) c")
    middle = nn.Sequential(*(TransformerBlock(32, heads=4) for _ in range(3)))
    error = relative_error(to_torch_encoder(list(middle))(pixels), middle(pixels))
    print(f"   three blocks for the middle of a U-Net against nn.TransformerEncoder: off by {error:.0e}")


# %% 15. Attention elsewhere: prompts, masks, positions
# If the queries come from the pixels of an image, and the keys and values from the words of a prompt, that is
# cross-attention. This is how a prompt enters Stable Diffusion's U-Net (Rombach et al. 2022).
def cross_attention(pixels, words, to_q, to_k, to_v):
    """Pixels `(n, s, c)` attend to words `(n, words, c_words)` with weights `(n, s, words)`; to_…: linear layers."""
    return attention(to_q(pixels), to_k(words), to_v(words))


# A language model learns to predict the next word at every position of a text at once. So no token may attend to later
# ones, which give the answer away. A causal mask sets their scores to minus infinity; softmax turns that into weights
# of zero. Without a mask, attention is blind to order, so most transformers use a positional encoding. The early ones
# add sines and cosines (01) or learned vectors (section 14). Many newer ones rotate queries and keys (01, section 5).
def causal_attention(q, k, v):
    """Each token attends to itself and to earlier ones: queries, keys and values `(..., s, d)` to `(..., s, d)`."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # ... s s
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)  # above the diagonal
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ v


@tools.section
def show_elsewhere():
    pixels, words, layers = torch.randn(64, 32), torch.randn(5, 48), [nn.Linear(size, 32) for size in (32, 48, 48)]
    weights, result = attention_weights(layers[0](pixels), layers[1](words)), cross_attention(pixels, words, *layers)
    print(f"   64 pixels and 5 words -> weights {tuple(weights.shape)} -> averages {tuple(result.shape)}")
    x = torch.randn(6, 8)
    before, after = (causal_attention(y, y, y)[:5] for y in (x, torch.cat([x[:5], x[5:] + 1])))
    print(f"   changing the last word changes earlier tokens by {relative_error(after, before):g}")


# %% 16. Attention can be a convolution
# A 3×3 convolution is nine heads, each attending to one of the nine pixels under the kernel (Cordonnier et al. 2020).
# The scores depend on positions only. If a head wants pixel j, the score of pixel p is -|p-j|² times a number so large
# that j itself gets all the weight. (This too is a dot product, of position features: -|p-j|² = 2 p·j - |p|² - |j|².)
# Beyond the border, softmax would give the weight to the nearest pixel, but a convolution reads a zero there. So we add
# a token of zeros, at a squared distance of 0.5: farther than the wanted pixel, closer than any other.
#
# In every head, a pixel's value is *all* its channels. In section 10's layer, each of nine heads has only c / 9 values:
# it could apply only a matrix of rank c / 9 or less, and not every convolution can be built from such matrices.
class PositionAttention(nn.Module):
    """Attention by position alone: head i attends to the pixel offsets[i] `(rows, columns)` away, or to zeros beyond
    the border. Activations `(n, channels_in, h, w)` to `(n, channels_out, h, w)`."""

    def __init__(self, channels_in, channels_out, offsets, bias=True):
        super().__init__()
        self.register_buffer("offsets", torch.tensor(offsets, dtype=torch.float32))  # heads 2
        self.proj = nn.Linear(len(offsets) * channels_in, channels_out, bias=bias)

    def scores(self, height, width):
        """`(heads, h w, h w + 1)`: each pixel's scores for all pixels and, last, for the token of zeros."""
        rows, columns = (torch.arange(size).to(self.offsets) for size in (height, width))
        pixels = torch.cartesian_prod(rows, columns)  # (h w) 2
        wanted = pixels + self.offsets[:, None]  # heads (h w) 2
        distances = (wanted[:, :, None] - pixels).square().sum(dim=-1)  # heads (h w) (h w), squared
        return -100 * F.pad(distances, (0, 1), value=0.5)

    def forward(self, x):
        tokens = F.pad(rearrange(x, "n c h w -> n (h w) c"), (0, 0, 0, 1))  # n (h w + 1) c: the last one holds zeros
        weights = self.scores(*x.shape[2:]).softmax(dim=-1)  # heads (h w) (h w + 1)
        attended = weights @ tokens[:, None]  # n heads (h w) c
        y = self.proj(rearrange(attended, "n heads s c -> n s (heads c)"))  # n (h w) channels_out
        return rearrange(y, "n (h w) c -> n c h w", h=x.shape[2])


def attention_from_convolution(conv):
    """An attention layer that computes the same function as a 3×3 convolution (up to rounding), on images of any size,
    borders included. Raises ValueError for anything but an `nn.Conv2d` with the settings in `expected`."""
    expected = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "padding_mode": "zeros"}
    expected |= {"dilation": (1, 1), "groups": 1}
    if not isinstance(conv, nn.Conv2d) or any(getattr(conv, name) != value for name, value in expected.items()):
        raise ValueError(f"expected an nn.Conv2d with {expected}, got {conv}")
    offsets = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    layer = PositionAttention(conv.in_channels, conv.out_channels, offsets, bias=conv.bias is not None)
    layer.to(conv.weight)  # the same dtype and device
    weight = rearrange(conv.weight, "out c rows columns -> out (rows columns c)")
    layer.proj.load_state_dict(conv.state_dict() | {"weight": weight})  # and its bias, if it has one
    return layer


@tools.section
def show_convolution():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(2, 16, 28, 28)
    error = relative_error(attention_from_convolution(conv)(x), conv(x))
    print(f"   16 to 32 channels, 28 × 28: relative difference {error:.0e}")
    corner = attention_from_convolution(conv).scores(28, 28).softmax(dim=-1)[:, 0]  # heads (h w + 1)
    print("   weight of the token of zeros in the top left corner, by head:", *(f"{head[-1]:.0%}" for head in corner))


# %% The command
def main():
    options = tools.make_parser(__file__, __doc__).parse_args()
    tools.run_sections(globals(), options.out)


if __name__ == "__main__":
    tools.run_command(main)
