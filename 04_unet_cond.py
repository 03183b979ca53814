"""Lesson 4: the U-Net gets attention and a class label, and draws the garment it is asked for.

Running it trains the conditional model, in about ten minutes on two CPU cores, and draws some of each class (lecture
sections "attention in the U-Net" and "conditional model"; notebook 28).

    python 04_unet_cond.py [--epochs E] [--data-dir DIR] [--help]
    python 04_unet_cond.py --sample-only --class "Ankle boot" --n 16
    python 04_unet_cond.py --pretrained      draws at once, from weights that come with it
    python 04_unet_cond.py --show            prints and draws what the sections say, best after the training
"""

# %% What this lesson needs
import copy
import functools
import importlib
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

lesson2 = importlib.import_module("02_attention")
MultiHeadSelfAttention = lesson2.MultiHeadSelfAttention
measure_kept = lesson2.measure_kept
measure_seconds = lesson2.measure_seconds
plot_image = lesson2.plot_image
save_picture = lesson2.save_picture

lesson3 = importlib.import_module("03_unet_uncond")
PRESETS = lesson3.PRESETS
Saved = lesson3.Saved
TimeResBlock = lesson3.TimeResBlock
TimeUNet = lesson3.TimeUNet
UserError = lesson3.UserError
crop = lesson3.crop
draw = lesson3.draw
draw_noise = lesson3.draw_noise
get_denoiser = lesson3.get_denoiser
load_trained = lesson3.load_trained
make_parser = lesson3.make_parser
noise_levels = lesson3.noise_levels
number = lesson3.number
sample = lesson3.sample
save_images = lesson3.save_images
spread = lesson3.spread
start = lesson3.start
zero_ = lesson3.zero_

lesson = lesson3.lesson1.Lesson("04_unet_cond.py", __name__ == "__main__")


# %% 1. Attention after the residual block, and on which levels
# What a convolution found here, every other pixel can now ask for: whether the left shoulder has a sleeve, say. So
# attention stands after each residual block, down and up, and once in the middle (where notebook 28 has none); a skip
# is saved after it.
class AttentionResBlock(TimeResBlock):
    """A residual block followed by self-attention with `out_channels / head_dim` heads. Raises ValueError where this
    isn't a whole number."""

    def __init__(self, in_channels, out_channels, groups, embedding_dim, head_dim):
        super().__init__(in_channels, out_channels, groups, embedding_dim)
        if out_channels % head_dim:
            raise ValueError(f"head_dim must divide the {out_channels} channels that attention gets, got {head_dim}")
        self.attention = MultiHeadSelfAttention(out_channels, out_channels // head_dim, groups)
        zero_(self.attention.proj)

    def forward(self, x, embedding):
        """x: `(n, in_channels, h, w)`, embedding: `(n, embedding_dim)`. Returns `(n, out_channels, h, w)`."""
        return self.attention(super().forward(x, embedding))


class SavedAttentionResBlock(Saved, AttentionResBlock):
    pass


# Every pixel asks every pixel: at 32 × 32 pixels a single head has a million weights for one image. That memory is why
# the lecture leaves the first level out. A fused kernel (lesson 2, section 11) never holds the weights, but its time
# still grows with the square of the number of pixels. And attention is hardly missed there: neighbours are for
# convolutions, and what is far away can be asked for on a level where the picture is small.
def measure_levels(preset, size):
    """For each level of a preset's net, at this padded size, and one image: the side in pixels; the bytes that a
    residual block keeps for its backward pass, without and with attention; the bytes of all attention weights, were
    they kept; the seconds of a forward and backward pass, without and with attention."""
    dim = 4 * preset.widths[0]
    embedding = torch.zeros(1, dim)
    for level, width in enumerate(preset.widths):
        side = size // preset.patch // 2**level
        head_dim = math.gcd(width, preset.head_dim)  # which must divide the width
        blocks = [
            TimeResBlock(width, width, preset.groups, dim),
            AttentionResBlock(width, width, preset.groups, dim, head_dim),
        ]
        for block in blocks:
            block.forward = lambda x, forward=block.forward: forward(x, embedding)
        x = torch.randn(1, width, side, side)
        weights = 4 * (width // head_dim) * side**4
        kept = [measure_kept(block, x) for block in blocks]
        yield side, *kept, weights, *measure_seconds(blocks, x, enough=0.3)


def stack_bars(axis, sides, parts, label):
    """A bar for each level, of which each part `(levels,)` is a piece."""
    for i, (name, values) in enumerate(parts.items()):
        below = sum(list(parts.values())[:i])
        style = {"color": ("0.8", "0.4", "white")[i], "hatch": ("", "", "//")[i], "edgecolor": "black"}
        axis.bar(range(len(sides)), values, bottom=below, label=name, **style)
    axis.set_xticks(range(len(sides)), [f"{side:.0f} × {side:.0f}" for side in sides])
    axis.set(xlabel="level of the lecture's net", ylabel=label)
    axis.legend()


@lesson
def show_balance(out):
    """1. What attention costs on each level: one block, one image, forward and backward"""
    print("                        megabytes kept                       milliseconds")
    print("    preset  side   without  with attention  its weights   without  with attention")
    for name, size in {"small": 28, "lecture": 32}.items():
        table = np.array(list(measure_levels(PRESETS[name], size))) * [1, 1e-6, 1e-6, 1e-6, 1e3, 1e3]
        for row in table:
            print("   {:>7}{:6.0f}{:10.2f}{:16.2f}{:13.2f}{:10.2f}{:16.2f}".format(name, *row))
    sides, plain, attending, weights, quick, slow = table.T
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
    parts = {"residual block": plain, "attention": attending - plain, "its weights, if kept": weights}
    stack_bars(axes[0], sides, parts, "MB for one block and one image")
    stack_bars(axes[1], sides, {"residual block": quick, "attention": slow - quick}, "milliseconds for the same")
    ratios = f"{slow[0] / quick[0]:.1f} times the block's time at {sides[0]:.0f} × {sides[0]:.0f}"
    ratios += f", {slow[-1] / quick[-1]:.1f} times at {sides[-1]:.0f} × {sides[-1]:.0f}"
    figure.suptitle(f"A block with attention takes {ratios}")
    save_picture(figure, out / "01_balance.png")


# %% 2. The label
# What is a label to a network? Each class has a row of numbers, which is learned. It is added to the embedding of time,
# so that every block hears of it in its scale and shift.
class CondUNet(TimeUNet):
    """The U-Net with attention and a class label.

    channels, widths, depth, groups: as in UNet.
    attention_levels: the levels with attention, 0 the first; the middle always has it.
    head_dim:         channels of a head, on every level.
    n_classes:        labels are 0 to n_classes - 1, and n_classes itself, which says "no label".
    """

    def __init__(self, channels, widths, depth, groups, attention_levels, head_dim, n_classes):
        self.attends = {"middle", *attention_levels}  # before super().__init__(), which builds the blocks
        self.head_dim, self.n_classes = head_dim, n_classes
        super().__init__(channels, widths, depth, groups)
        self.embed_label = nn.Embedding(n_classes + 1, self.embedding_dim)

    def block(self, place, in_channels, out_channels, saved=False):
        if place not in self.attends:
            return super().block(place, in_channels, out_channels, saved)
        block = SavedAttentionResBlock if saved else AttentionResBlock
        return block(in_channels, out_channels, self.groups, self.embedding_dim, self.head_dim)

    def embed(self, time, label=None):
        """As in TimeUNet, plus the label's embedding; None is "no label" for every image."""
        if label is None:
            label = torch.full((len(time),), self.n_classes, device=time.device)
        return super().embed(time, label) + self.embed_label(label)

    @classmethod
    def from_preset(cls, preset, n_classes):
        first = preset.patch**2, preset.widths, preset.depth, preset.groups
        return cls(*first, preset.attention_levels, preset.head_dim, n_classes)

    def training_label(self, label, generator):
        """The labels, but "no label" in one of ten cases: that is what guidance needs to know as well."""
        dropped = torch.rand(len(label), generator=generator, device=label.device) < 0.1
        return label.masked_fill(dropped, self.n_classes)


def draw_garments(denoise, noise, run):
    """The garments `(n, 1, h, w)` in [-1, 1] at the end of the path from this noise, in 18 steps."""
    *_, (_, x, _) = sample(denoise, noise, noise_levels(18))
    return crop(x, run.size).clamp(-1, 1).cpu()


@lesson
def show_labels(out):
    """2. The label: the same noise, every class"""
    denoiser, run = load_trained(lesson, CondUNet)
    n, rows = len(run.classes), 4
    noise = draw_noise(run, denoiser.device, [(0, 0, row) for row in range(rows)]).repeat_interleave(n, dim=0)
    label = torch.arange(n, device=noise.device).repeat(rows)
    images = draw_garments(lambda x, sigma: denoiser(x, sigma, label), noise, run)  # (rows n) 1 h w
    table = images.unflatten(0, (rows, n))
    by_label, by_noise = spread(table.transpose(0, 1)), spread(table)
    print(f"   a pixel's deviation: {by_label:.2f} among labels, same noise; {by_noise:.2f} among noises, same label")
    title = f"The label changes a pixel by {by_label:.2f}, the noise by {by_noise:.2f} ({run.data}; a row is one noise)"
    heads = [name.replace(" ", "\n").replace("/", "/\n") for name in run.classes]
    save_images(out / "02_labels.png", title, images, n, [f"noise {row}" for row in range(rows)], heads)


# %% 3. Guidance
# A model that has also learned to do without the label knows what the label changes. Its two predictions, without the
# label and with it, are two points, and guidance (classifier-free guidance, Ho and Salimans 2022) goes on along the
# line through them. (As x0_hat is x less the predicted noise, it's the same line for the noise, which papers speak of.
# What is w here is called guidance_scale = 1 + w in most software.) It gives clearer garments of the class, and fewer
# odd ones. But while there is much noise, the rough shape is being decided, and how light the garment will be; and
# guidance makes the garments of a class alike in both. So it waits until the noise is down to GUIDED_BELOW
# (Kynkäänniemi et al. 2024), which leaves half of the steps half of the work. The numbers below tell what it would do
# from the start. And a network that was trained for long knows its classes better, and needs less.
GUIDANCE, GUIDANCE_LATER, GUIDED_BELOW = 1.4, 0.8, 3


def choose_guidance(epochs):
    """The guidance, w below, that suits a network trained for so many epochs."""
    return GUIDANCE if epochs < 10 else GUIDANCE_LATER


def guide(denoiser, label, guidance, below=GUIDED_BELOW):
    """denoise(x, sigma) for `sample`: x0(label) + w · (x0(label) - x0(no label)), in one batched call.

    label: int64 `(n,)`. guidance: w. 0 is the model with the label as it is, -1 the one without. below: for a sigma
    above this w is 0, unless it is negative: what leads away from the label does so from the start. (In the step where
    guidance begins, DPM-Solver++(2M) takes the jump of x0_hat for a trend, and goes on by half of it. Samples were no
    better without.)
    """
    no_label = torch.full_like(label, denoiser.network.n_classes)

    def denoise(x, sigma):
        w = guidance * ((sigma <= below) | (guidance < 0)).to(x.dtype).view(-1, 1, 1, 1)
        if not w.any():
            return denoiser(x, sigma, label)
        both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([label, no_label]))
        with_label, without = both.chunk(2)
        return with_label + w * (with_label - without)

    return denoise


@lesson
def show_guidance(out):
    """3. Guidance: a line through two predictions"""
    denoiser, run = load_trained(lesson, CondUNet)
    n = len(run.classes)
    label = torch.arange(n, device=denoiser.device)
    noise = draw_noise(run, denoiser.device, [(0, int(i), 0) for i in label])
    x, sigma = 3 * noise, torch.full((n,), 3.0, device=noise.device)
    line = {f"guidance {w:g}": guide(denoiser, label, w)(x, sigma) for w in (-1, 0, 0.5, 1, 3)}
    away = [f"{(point - line['guidance 0']).square().mean().sqrt():.2f}" for point in line.values()]
    print(f"   guidance -1, 0, 0.5, 1, 3 at sigma 3: {', '.join(away)} away from what the label says by itself")
    rows, names = [crop(point, run.size).cpu() for point in line.values()], ["no label", "label", *list(line)[2:]]
    title = f"One step at sigma 3: from no label to the label, and on along the same line ({run.data})"
    save_images(out / "03_line.png", title, torch.cat(rows), n, names)

    rows, apart, many = [], [], 4  # of each class
    noise = draw_noise(run, denoiser.device, [(0, int(i), k) for k in range(many) for i in label])
    quiet = f"where σ ≤ {GUIDED_BELOW}"
    settings = {"guidance 0": (0, 0), f"1, {quiet}": (1, GUIDED_BELOW), f"3, {quiet}": (3, GUIDED_BELOW)}
    settings["3, always"] = 3, math.inf
    for name, (w, below) in settings.items():
        images = draw_garments(guide(denoiser, label.repeat(many), w, below), noise, run)
        rows.append(images[:n])
        apart.append(spread(images.unflatten(0, (many, n))))
        print(f"   {name:14}: garments of a class {apart[-1]:.2f} apart; mean pixel {images.mean():.2f}")
    title = f"Garments of a class are {apart[0]:.2f} apart, and {apart[-1]:.2f} with guidance 3 from the start"
    save_images(out / "03_guidance.png", f"{title} ({run.data})", torch.cat(rows), n, list(settings))


# %% 4. From one class to another
# The label is a row of numbers, and between two rows there are others, which no class has. What does the network draw
# when it is told "three quarters a pullover, one quarter a trouser"?
def blend(denoiser, one, other, steps):
    """A copy of the denoiser whose labels 0 to steps - 1 lead evenly from class `one` to class `other`."""
    blended = copy.deepcopy(denoiser)
    rows = denoiser.network.embed_label.weight
    weights = torch.linspace(0, 1, steps, device=rows.device)[:, None]
    blended.network.embed_label = nn.Embedding.from_pretrained(torch.lerp(rows[one], rows[other], weights))
    return blended


@lesson
def show_blend(out):
    """4. From one class to another, through the embedding"""
    denoiser, run = load_trained(lesson, CondUNet)
    n, steps = len(run.classes), 9
    pairs = [(one % n, other % n) for one, other in ((1, 3), (2, 1), (9, 5), (7, 9), (8, 6))]
    names = [f"{run.classes[one]} to\n{run.classes[other]}" for one, other in pairs]
    rows, largest, label = [], [], torch.arange(steps, device=denoiser.device)
    for (one, other), name in zip(pairs, names, strict=True):
        denoise = functools.partial(blend(denoiser, one, other, steps), label=label)
        noise = draw_noise(run, denoiser.device, [(0, one, 0)]).expand(steps, -1, -1, -1)
        rows.append(draw_garments(denoise, noise, run))
        jumps = (rows[-1][1:] - rows[-1][:-1]).flatten(1).norm(dim=1)
        largest.append(float(jumps.max() / jumps.sum()))
        print(f"   {name}: {largest[-1]:.0%} of the way in the largest of {steps - 1} steps".replace("\n", " "))
    heads = [f"{i / (steps - 1):.0%}" for i in range(steps)]
    shares = f"{min(largest):.0%} to {max(largest):.0%}"
    title = f"From class to class, the largest of {steps - 1} steps makes {shares} of the way"
    save_images(out / "04_blend.png", f"{title} ({run.data})", torch.cat(rows), steps, names, heads)


# %% 5. Where a pixel looks
# Lesson 2 opened attention with pixels that looked for what is like them. What has this network learned to look for?
def catch_weights(layer, denoise, x, sigma):
    """The weights `(n, heads, h w, h w)` of an attention layer while denoise(x, sigma) runs."""
    caught = []
    handle = layer.register_forward_pre_hook(lambda layer, inputs: caught.append(inputs[0].float()))
    denoise(x, sigma)
    handle.remove()
    return layer(caught[0], return_weights=True)[1]


@lesson
def show_look(out):
    """5. Where a pixel looks: in the last attention on the way up, by head and noise level"""
    denoiser, run = load_trained(lesson, CondUNet)
    label = torch.tensor([len(run.classes) - 1], device=denoiser.device)
    denoise = guide(denoiser, label, 0)
    layer = [block for block in denoiser.network.up if isinstance(block, AttentionResBlock)][-1].attention
    states = list(sample(denoise, draw_noise(run, denoiser.device, [(0, int(label), 0)]), noise_levels(18)))
    side = states[0][1].shape[2]
    shown = [min(states[:-1], key=lambda state: abs(np.log(state[0] / sigma))) for sigma in (20, 1, 0.1)]
    heads = min(layer.heads, 4)
    figure, axes = plt.subplots(3, 1 + heads, figsize=(8, 5.6))
    for row, (sigma, x, x0_hat) in zip(axes, shown, strict=True):
        weights = catch_weights(layer, denoise, x, torch.full((1,), sigma, device=x.device))[0, :heads].cpu()
        places = round(weights.shape[1] ** 0.5)  # in a row and in a column: garments are square
        y, x_place = round(0.6 * places), round(0.3 * places)
        looks = weights[:, y * places + x_place].unflatten(1, (places, places))  # heads h w
        rows, columns = torch.arange(places)[:, None] - y, torch.arange(places) - x_place
        far = looks[:, (rows**2 + columns**2) > 4].sum(dim=1)
        print(
            f"   sigma {sigma:6.2f}: weight more than two places away, by head: " + ", ".join(f"{f:.0%}" for f in far)
        )
        plot_image(row[0], x0_hat[0, 0].cpu(), f"x0_hat, σ = {sigma:.2g}", vmin=-1, vmax=1)
        scale = side / places
        row[0].plot(scale * (x_place + 0.5) - 0.5, scale * (y + 0.5) - 0.5, "s", color="white", markerfacecolor="none")
        for axis, look, share in zip(row[1:], looks, far, strict=True):
            plot_image(axis, look, f"{share:.0%} far away", cmap="gray_r", vmin=0)
            axis.plot(x_place, y, "s", color="tab:orange", markerfacecolor="none")
    for head, axis in enumerate(axes[-1, 1:]):
        axis.set_xlabel(f"head {head + 1}")
    heard = f"Which of {places} × {places} places the marked one hears"
    figure.suptitle(f"{heard}: it depends on head and noise ({run.data})")
    save_picture(figure, out / "05_look.png")


# %% Lesson 4 as a command
def find_classes(text, classes):
    """The numbers of the classes to draw, from a name or number, or of all for None. Raises UserError where there is
    none."""
    names = [name.lower() for name in classes]
    if text is None:
        return list(range(len(classes)))
    if text.lower() in names:
        return [names.index(text.lower())]
    if text.isdecimal() and int(text) < len(classes):
        return [int(text)]
    raise UserError(f"--class {text}: must be one of {', '.join(classes)}, or a number from 0 to {len(classes) - 1}")


def main(options):
    if options.pretrained and options.restart:
        raise UserError("--pretrained draws from weights as they are: leave out --restart, which trains anew")
    options.sample_only |= options.pretrained
    denoiser, run = get_denoiser(options, CondUNet, check=lambda run: find_classes(options.only, run.classes))
    wanted = find_classes(options.only, run.classes)
    guidance = choose_guidance(run.epochs) if options.guidance is None else options.guidance
    starts = [(options.seed, number, index) for number in wanted for index in range(options.n)]
    label = torch.tensor([number for _, number, _ in starts], device=options.device)
    title = f"{run.title}, {options.steps} steps, guidance {guidance:g}"
    layout = {"rows": run.classes, "columns": options.n}
    if options.only is not None:
        title, layout = f"{run.classes[wanted[0]]}: {title}", {"columns": 8}
    draw(lambda chosen: guide(denoiser, label[chosen], guidance), starts, run, options, title, **layout)


if __name__ == "__main__":
    parser = make_parser("04_unet_cond.py", __doc__)
    parser.add_argument("--class", dest="only", metavar="NAME-OR-ID", help="draw this class only (all)")
    guidance = number(float, -100, "a number from -100 up")
    parser.add_argument(
        "--guidance",
        metavar="W",
        type=guidance,
        help="how strongly the label guides: 0 is the label as it is, -1 none "
        f"({GUIDANCE:g}; of a network trained for 10 epochs or more {GUIDANCE_LATER:g})",
    )
    parser.add_argument("--pretrained", action="store_true", help="don't train: take the weights in data/pretrained")
    parser.set_defaults(n=10)
    start(parser, main, lesson)
