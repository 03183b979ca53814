"""Lesson 4: the U-Net gets attention and a class label, and makes the garment it is asked for.

Running it trains the conditional model and samples some of each class (lecture sections "attention in the U-Net" and
"conditional model"; notebook 28).

    python 04_unet_cond.py [--epochs E] [--data-dir DIR] [--help]
    python 04_unet_cond.py --sample-only --class "Ankle boot" --n 16
    python 04_unet_cond.py --pretrained      samples at once, from weights that come with it
    python 04_unet_cond.py --show            prints and draws what the sections say, best after the training
"""

import copy
import functools
import importlib
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

lesson1 = importlib.import_module("01_time_embedding")
lesson2 = importlib.import_module("02_attention")
lesson3 = importlib.import_module("03_unet_uncond")

PRETRAINED = Path(lesson1.__file__).parent / "data" / "pretrained" / "cond.pt"
TRAINED = {"path": PRETRAINED, "device": "auto"}  # the network that the sections ask; the command line can change it


# %% 1. Attention after the residual block, and on which levels
# What a convolution found here, every other pixel can now ask for: whether the left shoulder has a sleeve, say. So
# attention stands after each residual block, down and up, and once in the middle (where notebook 28 has none); a skip
# is saved after it.
class AttentionResBlock(lesson3.TimeResBlock):
    """A residual block, with a place for attention after it."""

    def __init__(self, in_channels, out_channels, groups, embedding_dim):
        super().__init__(in_channels, out_channels, groups, embedding_dim)
        self.attention = nn.Identity()

    def add_attention(self, head_dim):
        """Attention with heads of so many channels. Raises ValueError where they don't divide the block's."""
        channels, groups = self.conv2.norm.num_channels, self.conv2.norm.num_groups
        if channels % head_dim:
            raise ValueError(f"head_dim must divide the {channels} channels that attention gets, got {head_dim}")
        self.attention = lesson2.MultiHeadSelfAttention(channels, channels // head_dim, groups, lesson2.fused_attention)
        lesson3.zero_(self.attention.attention.proj)  # the branch starts silent

    def forward(self, x, embedding):
        return self.attention(super().forward(x, embedding))


class SavedAttentionResBlock(lesson3.Saved, AttentionResBlock):
    pass


# At 32 × 32 pixels a head has 1024² weights, 4 MB for one image. With 4 heads in each of its 5 blocks, the lecture's
# first level would have 84 MB of them: 43 GB for its batches of 512. At 16 × 16, with twice the heads, it is an eighth
# of that. So the lecture leaves the first level out. A fused kernel (lesson 2, section 11) never holds the weights, but
# its time still grows with the square of the number of pixels.
def measure_levels(preset, size):
    """For each level of a preset's net, one image of this padded size: the side in pixels; the megabytes that a block
    keeps for its backward pass, without and with attention; those of all attention weights, were they kept; the
    milliseconds of a forward and backward pass, without and with attention."""
    embedding = torch.zeros(1, 4 * preset.widths[0])
    for level, width in enumerate(preset.widths):
        side = size // preset.patch // 2**level
        blocks = [AttentionResBlock(width, width, preset.groups, 4 * preset.widths[0]) for _ in range(2)]
        blocks[1].add_attention(preset.head_dim)
        x = torch.randn(1, width, side, side, requires_grad=True)
        kept = [lesson2.measure_kept(block, x, embedding) / 1e6 for block in blocks]
        passes = [functools.partial(block, embedding=embedding) for block in blocks]
        seconds = lesson2.measure_seconds(passes, x, enough=0.3)
        yield side, *kept, 4e-6 * (width // preset.head_dim) * side**4, *(1000 * value for value in seconds)


@lesson1.section
def show_cost():
    levels = measure_levels(lesson3.PRESETS["lecture"], 32)
    sides, plain, attending, weights, quick, slow = zip(*levels, strict=True)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
    curves = {"block": plain, "with attention": attending, "weights, if kept": weights}
    labels = {"xlabel": "side of the level in pixels", "xscale": "log"}
    lesson1.plot_lines(axes[0], sides, curves, ylabel="megabytes kept of an image", yscale="log", **labels)
    lesson1.plot_lines(axes[1], sides, {"block": quick, "with attention": slow}, ylabel="milliseconds", **labels)
    said = f"a block's weights would be {weights[0]:.0f} MB an image; with attention it takes"
    figure.suptitle(f"At {sides[0]} × {sides[0]} {said} {slow[0] / quick[0]:.0f} times as long")
    return figure


# %% 2. What the convolutions reach without it
# Is there anything far away that a pixel of this U-Net couldn't know without attention? Lesson 2 counts it: on which
# input pixels does one output pixel depend? In a new network on none, as its last convolution is zero; so all
# convolutions get random weights. And a group norm is another way across, as all pixels meet in its mean; so the norms
# are left out. The convolutions alone get across by going down: one pixel of the lowest level stands for many above. So
# an output pixel depends on all 196 of the small net's patches, and on all 1,024 pixels of the lecture's net, if
# faintly. What is left for attention is to choose by content, rather than by place, what to hear of. On
# Fashion-MNIST that hardly helps; where convolutions can't reach, it decides (docs/measurements.md has both).
def without_norms(network):
    """The network with random convolutions and without norms, in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return network


@lesson1.section
def show_reach():
    torch.manual_seed(0)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.8))
    for axis, (name, size) in zip(axes, {"small": 28, "lecture": 32}.items(), strict=True):
        preset = lesson3.PRESETS[name]
        side = size // preset.patch
        network = without_norms(lesson3.TimeUNet(preset.patch**2, preset.widths, preset.depth, preset.groups))
        x = torch.randn(1, preset.patch**2, side, side)
        gradient = lesson2.influence(functools.partial(network, time=torch.zeros(1)), x, side // 3, side // 3)
        seen = gradient.count_nonzero().item()
        print(f"   {name}: an output pixel depends on {seen} of {side**2} places, without attention and norms")
        share = (gradient / gradient.max()).log10()
        lesson1.plot_image(axis, share, f"{name}: {seen} of {side**2} places", vmin=-6, vmax=0)
    figure.suptitle("What an output pixel depends on in the U-Net without attention\n(white: most; black: a millionth)")
    return figure


# %% 3. The label
# What is a label to a network? Each class has a row of numbers, which is learned. It is added to the embedding of time,
# so that every block hears of it in its scale and shift.
class CondUNet(lesson3.TimeUNet):
    """The U-Net with attention and a class label.

    channels, widths, depth, groups: as in UNet.
    attention_levels: the levels with attention, 0 the first; the middle always has it.
    head_dim:         channels of a head, on every level.
    n_classes:        labels are 0 to n_classes - 1, and n_classes itself, which says "no label".
    """

    def __init__(self, channels, widths, depth, groups, attention_levels, head_dim, n_classes):
        super().__init__(channels, widths, depth, groups)
        self.n_classes = n_classes
        self.embed_label = nn.Embedding(n_classes + 1, 4 * widths[0])
        for level in attention_levels:
            for block in (*self.down[level], *self.up[-1 - level]):  # the up path begins with the lowest level
                block.add_attention(head_dim)
        self.middle[0].add_attention(head_dim)

    def make_block(self, in_channels, out_channels, saved=False):
        kind = SavedAttentionResBlock if saved else AttentionResBlock
        return kind(in_channels, out_channels, self.groups, 4 * self.widths[0])

    def forward(self, x, time, label=None):
        """x and the result: `(n, channels, height, width)`; time: `(n,)`, float; label: `(n,)`, int64, None is "no
        label" for every image."""
        if label is None:
            label = torch.full((len(x),), self.n_classes, device=x.device)
        embedding = self.embed_time(time) + self.embed_label(label)  # n (4 widths[0])
        return lesson3.UNet.forward(self, x, embedding)  # TimeUNet's would embed the time alone


# One label in ten is dropped in training, so that the network also learns to do without: guidance needs that.
def drop_labels(label, n_classes):
    """The labels `(n,)` as the network is told them, in a tuple: one in ten is n_classes, "no label"."""
    return (label.masked_fill(torch.rand(len(label), device=label.device) < 0.1, n_classes),)


MODEL = lesson3.Model(CondUNet, lambda preset, n: (preset.attention_levels, preset.head_dim, n), drop_labels)


@functools.cache
def load():
    """The trained denoiser that the sections ask, and its run."""
    return lesson3.load_trained(TRAINED["path"], MODEL, lesson3.choose_device(TRAINED["device"]))


def follow(denoise, starts):
    """The images `(n, 1, h, w)` that `denoise` makes; starts: (seed, label, index) of each one's noise."""
    denoiser, run = load()
    noise = lesson3.draw_noise(run, starts, denoiser.device)
    *_, (_, x, _) = lesson3.sample(denoise, noise, lesson3.noise_levels())
    return lesson3.crop(x, run.size).clamp(-1, 1).cpu()


@lesson1.section
def show_labels():
    denoiser, run = load()
    n, rows = len(run.classes), 4
    label = torch.arange(n, device=denoiser.device).repeat(rows)
    starts = [(0, 0, row) for row in range(rows) for _ in range(n)]
    images = follow(lambda x, sigma: denoiser(x, sigma, label), starts)  # (rows n) 1 h w
    table = images.unflatten(0, (rows, n))
    by_label, by_noise = lesson3.spread(table.transpose(0, 1)), lesson3.spread(table)
    title = f"The label changes a pixel by {by_label:.2f}, the noise by {by_noise:.2f} ({run.data}; a row is one noise)"
    titles = [name.replace(" ", "\n").replace("/", "/\n") for name in run.classes]
    return lesson1.plot_grid(title, images, n, [f"noise {row}" for row in range(rows)], titles)


# %% 4. Guidance: a line through two predictions
# A model that has also learned to do without the label knows what the label changes. Its two predictions, without the
# label and with it, are two points, and guidance (classifier-free guidance, Ho and Salimans 2022) goes on along the
# line through them: x0_hat = x0(label) + w · (x0(label) - x0(no label)). Most software's guidance_scale is 1 + w. (As
# x0_hat is x less sigma times the predicted noise, it's the same line for the noise, which papers speak of.) It gives
# clearer garments of the class, and fewer odd ones.
#
# But it waits until the noise is down to GUIDED_BELOW (Kynkäänniemi et al. 2024; section 5 shows why), so the first 7
# of 14 steps evaluate the network once instead of twice. And a network that was trained for long knows its classes
# better, and needs less (docs/measurements.md).
GUIDANCE, GUIDANCE_LONG = 1.4, 0.8  # measured after 180,000 and 1,440,000 images; where it changes is a guess
GUIDED_BELOW = 3  # sigma


def choose_guidance(seen):
    """The guidance, w above, that suits a network whose run is of so many images (its epochs times theirs)."""
    return GUIDANCE if seen < 600_000 else GUIDANCE_LONG


def guide(denoiser, label, guidance, below=GUIDED_BELOW):
    """denoise(x, sigma) for `sample`, in one batched call. label: int64 `(n,)`. guidance: w; 0 is the model with the
    label as it is, -1 the one without. below: for a sigma above this w is 0; all sigmas of a batch are equal."""
    both_labels = torch.cat([label, torch.full_like(label, denoiser.network.n_classes)])

    def denoise(x, sigma):
        if guidance == 0 or sigma[0] > below:
            return denoiser(x, sigma, label)
        with_label, without = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both_labels).chunk(2)
        return with_label + guidance * (with_label - without)

    return denoise


@lesson1.section
def show_line():
    denoiser, run = load()
    n = len(run.classes)
    x = 3 * lesson3.draw_noise(run, [(0, i, 0) for i in range(n)], denoiser.device)  # nothing but noise
    label, sigma = torch.arange(n, device=x.device), torch.full((n,), 3.0)
    settings = {"no label": -1, "label": 0, "guidance 0.5": 0.5, "guidance 1": 1, "guidance 3": 3}
    points = [guide(denoiser, label, w, math.inf)(x, sigma) for w in settings.values()]
    away = [f"{(point - points[1]).square().mean().sqrt():.2f}" for point in points]
    print(f"   guidance -1, 0, 0.5, 1, 3 at sigma 3: {', '.join(away)} away from what the label says by itself")
    images = lesson3.crop(torch.cat(points), run.size).cpu()
    title = f"One step at sigma 3: from no label to the label, and on along the same line ({run.data})"
    return lesson1.plot_grid(title, images, n, settings)


# %% 5. How strong, and from when
# While there is much noise, the rough shape is being decided, and how light the garment will be. Guided from the start,
# the garments of a class become alike in both, and lighter. From where the noise is down to 3, even with strong
# guidance they stay as far apart as without. (Measured in pixels, on four garments of each class. Too much of it still
# makes only what is typical: docs/measurements.md.)
@lesson1.section
def show_guidance():
    denoiser, run = load()
    n, many, rows, apart = len(run.classes), 4, [], []  # many: of each class
    label = torch.arange(n, device=denoiser.device).repeat(many)
    starts = [(0, i, k) for k in range(many) for i in range(n)]
    quiet = f"where σ ≤ {GUIDED_BELOW}"
    settings = {"guidance 0": (0, 0), f"1, {quiet}": (1, GUIDED_BELOW), f"3, {quiet}": (3, GUIDED_BELOW)}
    settings["3, always"] = 3, math.inf
    for name, (w, below) in settings.items():
        images = follow(guide(denoiser, label, w, below), starts)
        rows.append(images[:n])
        apart.append(lesson3.spread(images.unflatten(0, (many, n))))
        print(f"   {name:14}: garments of a class {apart[-1]:.2f} apart; mean pixel {images.mean():.2f}")
    title = f"Garments of a class are {apart[0]:.2f} apart, and {apart[-1]:.2f} with guidance 3 from the start"
    return lesson1.plot_grid(f"{title} ({run.data})", torch.cat(rows), n, list(settings))


# %% 6. From one class to another
# The label is a row of numbers, and between two rows there are others, which no class has. What does the network make
# when it is told "three quarters a pullover, one quarter a trouser"? Of eight even steps each would be an eighth of the
# way. But the largest is two to four times as long: there, one class becomes the other.
def blend(denoiser, one, other, steps):
    """A copy of the denoiser whose labels 0 to steps - 1 lead evenly from class `one` to class `other`."""
    blended = copy.deepcopy(denoiser)
    rows = denoiser.network.embed_label.weight
    weights = torch.linspace(0, 1, steps, device=rows.device)[:, None]
    blended.network.embed_label = nn.Embedding.from_pretrained(torch.lerp(rows[one], rows[other], weights))
    return blended


@lesson1.section
def show_blend():
    denoiser, run = load()
    n, steps, rows, largest = len(run.classes), 9, [], []
    pairs = ((1, 3), (2, 1), (9, 5), (7, 9), (8, 6)) if n >= 10 else [(one, (one + 1) % n) for one in range(n)]
    names = [f"{run.classes[one]} to\n{run.classes[other]}" for one, other in pairs]
    label = torch.arange(steps, device=denoiser.device)
    for one, other in pairs:
        rows.append(follow(guide(blend(denoiser, one, other, steps), label, 0), [(0, one, 0)] * steps))
        jumps = rows[-1].diff(dim=0).flatten(1).norm(dim=1)
        largest.append(float(jumps.max() / jumps.sum()))
    shares = f"{min(largest):.0%} to {max(largest):.0%}"
    title = f"From class to class, the largest of {steps - 1} steps makes {shares} of the way ({run.data})"
    return lesson1.plot_grid(title, torch.cat(rows), steps, names, [f"{i / (steps - 1):.0%}" for i in range(steps)])


# %% 7. Where a pixel looks
# Lesson 2 opened attention with pixels that looked for what is like them. What has this network learned to look for?
# Some heads look nearby, others far away, and where they look changes with the noise.
def catch_weights(layer, denoise, x, sigma):
    """The weights `(n, heads, h, w, h, w)` of an attention layer while denoise(x, sigma) runs."""
    caught = []
    handle = layer.register_forward_pre_hook(lambda layer, inputs: caught.append(inputs[0].float()))
    denoise(x, sigma)
    handle.remove()
    size = caught[0].shape[2:]  # h w
    return layer.weights(caught[0]).unflatten(3, size).unflatten(2, size)


@lesson1.section
def show_look():
    denoiser, run = load()
    layer = [part for part in denoiser.network.up.modules() if isinstance(part, lesson2.MultiHeadSelfAttention)][-1]
    label = torch.tensor([len(run.classes) - 1], device=denoiser.device)
    denoise, noise = guide(denoiser, label, 0), lesson3.draw_noise(run, [(0, int(label), 0)], denoiser.device)
    states = list(lesson3.sample(denoise, noise, lesson3.noise_levels()))
    figure, axes = plt.subplots(3, 4, figsize=(8, 6))
    for row, shown in zip(axes, (20, 1, 0.1), strict=True):
        sigma, x, x0_hat = min(states[:-1], key=lambda state: abs(math.log(state[0] / shown)))
        looks = catch_weights(layer, denoise, x, torch.tensor([sigma]))[0, :3].cpu()  # heads h w h w
        even = 1 - 25 / looks[0, 0, 0].numel()
        y, place = round(0.6 * looks.shape[1]), round(0.3 * looks.shape[2])
        lesson1.plot_image(row[0], x0_hat[0, 0].cpu(), f"x0_hat, σ = {sigma:.2g}", vmin=-1, vmax=1)
        for axis, look in zip(row[1:], looks[:, y, place], strict=False):
            far = 1 - look[max(0, y - 2) : y + 3, max(0, place - 2) : place + 3].sum()  # over two places away
            lesson1.plot_image(axis, look, f"{far:.0%} far away", cmap="gray_r", vmin=0)
            axis.plot(place, y, "s", color="tab:orange", markerfacecolor="none")
    figure.suptitle(f"What three heads hear; of even weights, {even:.0%} would be far away ({run.data})")
    return figure


# %% The command
def find_classes(text, classes):
    """The numbers of the classes to sample, from a name or number, or of all for None. Raises UserError where there is
    none."""
    names = [name.lower() for name in classes]
    if text is None:
        return list(range(len(classes)))
    if text.lower() in names:
        return [names.index(text.lower())]
    if text.isdecimal() and int(text) < len(classes):
        return [int(text)]
    last = len(classes) - 1
    raise lesson3.UserError(f"--class {text}: must be one of {', '.join(classes)}, or a number from 0 to {last}")


def work(options):
    path = PRETRAINED if options.pretrained else options.out / "checkpoint.pt"
    if options.show:
        TRAINED.update(path=path if path.exists() else PRETRAINED, device=options.device)
        lesson1.run_sections(globals(), options.out / "lesson")
        return
    if options.only is not None and not options.sample_only:
        find_classes(options.only, lesson3.load_once(split="train", **lesson3.DATA).classes)  # better before training
    denoiser, run = lesson3.get_denoiser(options, MODEL, path)
    wanted = find_classes(options.only, run.classes)
    guidance = choose_guidance(run.epochs * run.images) if options.guidance is None else options.guidance
    starts = [(options.seed, label, index) for label in wanted for index in range(options.n)]
    sampler = functools.partial(lesson3.sample, sigmas=lesson3.noise_levels(options.steps))
    make_denoise = functools.partial(guide, denoiser, guidance=guidance)
    samples = lesson3.sample_images(run, starts, make_denoise, sampler, denoiser.device)
    title = f"{run.title}, {options.steps} steps, guidance {guidance:g}"
    grid = {"rows": run.classes, "columns": options.n}
    if options.only is not None:
        title, grid = f"{run.classes[wanted[0]]}: {title}", {"columns": 8}
    lesson3.write_samples(options.out, title, samples, **grid)


def main():
    parser, group = lesson3.make_run_parser(__file__, __doc__, n=10)
    parser.add_argument("--class", dest="only", metavar="NAME-OR-ID", help="sample this class only (all)")
    text = f"how strongly the label guides, 0 as it is ({GUIDANCE:g}; after 600,000 images {GUIDANCE_LONG:g})"
    parser.add_argument("--guidance", metavar="W", type=lesson3.number(float, 0, 100), help=text)
    group.add_argument("--pretrained", action="store_true", help="sample from the weights in data/pretrained")
    options = parser.parse_args()
    options.sample_only |= options.pretrained
    if options.pretrained and options.out == Path(parser.get_default("out")):
        options.out = lesson1.folder(options.out.parent / "pretrained")  # nobody's own samples are overwritten
    lesson3.start(parser, options, work)


if __name__ == "__main__" and not hasattr(sys, "ps1"):
    main()
