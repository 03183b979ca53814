"""Lesson 4: the U-Net gets attention and a class label, and makes the garment you ask for.

Running it trains the conditional model and samples each class (lecture sections "attention in the U-Net" and
"conditional model"; notebook 28).

    python 04_unet_cond.py [--epochs E] [--data-dir DIR] [--help]
    python 04_unet_cond.py --sample-only --class "Ankle boot" --n 16
    python 04_unet_cond.py --pretrained      samples right away, from the shipped weights
    python 04_unet_cond.py --show            runs the sections, with your network or the shipped one
"""

import copy
import functools
import importlib
import math
import os
import unicodedata
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import lesson_tools as tools

lesson2 = importlib.import_module("02_attention")
lesson3 = importlib.import_module("03_unet_uncond")
PRETRAINED = tools.RUNS.parent / "data" / "pretrained" / "cond.pt"


# %% 1. Attention after the residual block, and on which levels
# Attention lets every pixel use what a convolution found anywhere: whether the left shoulder has a sleeve, say. So it
# follows each residual block on the chosen levels, down and up, and one in the middle (notebook 28 has none there). The
# skips are saved after the attention. Does attention help? The lecturer hasn't seen it improve the FID in his own runs.
class AttentionResBlock(lesson3.TimeResBlock):
    """A residual block, then optional attention. (A block doesn't know its level, so the U-Net adds the attention.)"""

    def __init__(self, in_channels, out_channels, groups, embedding_dim):
        super().__init__(in_channels, out_channels, groups, embedding_dim)
        self.attention = nn.Identity()

    def add_attention(self, head_dim):
        """Add attention with heads of head_dim channels. Raises ValueError if head_dim doesn't divide the channels."""
        channels, groups = self.conv2.norm.num_channels, self.conv2.norm.num_groups
        if channels % head_dim:
            raise ValueError(f"head_dim must divide the {channels} channels of the block, got {head_dim}")
        self.attention = lesson2.AttentionBlock(channels, channels // head_dim, groups, lesson2.fused_attention)
        lesson3.zero_(self.attention.attention.proj)  # a zero-initialised branch changes nothing at first

    def forward(self, x, embedding):
        return self.attention(super().forward(x, embedding))


class SavedAttentionResBlock(lesson3.Saved, AttentionResBlock):
    pass


# At 32 × 32 pixels a head has 1024² weights: 4 MB per image. With 4 heads in each of 5 blocks, the lecture's first
# level would need 84 MB per image, or 43 GB for a batch of 512. At 16 × 16, with twice the heads, an eighth is enough.
# The lecture starts there. A fused kernel (section 13 of 02) never stores the weights, but its time grows as pixels².
@tools.section
def show_cost():
    preset = lesson3.PRESETS["lecture"]
    for level, width in enumerate(preset.widths):
        side, heads = 32 // 2**level, width // preset.head_dim
        weights = 4e-6 * heads * side**4  # MB, at 4 bytes per weight
        print(f"   {side:2} × {side:2} pixels, {heads:2} heads: {weights:5.2f} MB of weights per image, in each block")


# %% 2. The label
# How does a network take a label? Each class has a learned vector, its embedding. We add it to the time embedding, so
# the label reaches every block, through its scale and shift.
class CondUNet(lesson3.TimeUNet):
    """The U-Net with attention and a class label.

    channels, widths, depth, groups: as in UNet.
    attention_levels: the levels with attention, counted from 0; the middle always has it.
    head_dim:         channels per head, on every level.
    n_classes:        labels run from 0 to n_classes - 1; n_classes itself means "no label".
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

    def embed(self, time, label):
        """The embedding that every block gets, `(n, 4 * widths[0])`. label: int64 `(n,)`, or None for "no label" on
        every image."""
        if label is None:
            label = torch.full((len(time),), self.n_classes, device=time.device)
        return self.embed_time(time) + self.embed_label(label)


# One label in ten is dropped in training, so that the network also learns to do without: guidance needs that.
def drop_labels(batches, n_classes):
    """The batches of `draw_batches`, with one label in ten replaced by n_classes, "no label"."""
    for step, x0, sigma, noise, label in batches:
        dropped = torch.rand(len(label), device=label.device) < 0.1  # reproducible: draw_batches has set the seed
        yield step, x0, sigma, noise, label.masked_fill(dropped, n_classes)


def make_network(preset, n_classes):
    """A new network for one of the presets of 03."""
    attention = preset.attention_levels, preset.head_dim
    return CondUNet(preset.patch**2, preset.widths, preset.depth, preset.groups, *attention, n_classes)


@functools.cache
def load_demo_model():
    """The denoiser that the sections use, and its settings: yours if you have trained one, otherwise the shipped one.
    `$LESSON_RUN` can name the folder of another run."""
    path = Path(os.environ.get("LESSON_RUN", tools.RUNS / "04_unet_cond")) / "checkpoint.pt"
    return lesson3.load_denoiser(path if path.exists() else PRETRAINED, make_network, tools.choose_device("auto"))


def generate(denoise, label, noise_ids):
    """Images `(n, 1, h, w)` with these labels `(n,)`, by denoise(x, sigma, label). noise_ids: one (seed, label, index)
    per image; they only choose the noise."""
    denoiser, settings = load_demo_model()
    noise = lesson3.draw_noise(settings, noise_ids, denoiser.device)
    *_, (_, x, _) = lesson3.sample_dpm(functools.partial(denoise, label=label), noise, lesson3.noise_levels())
    return lesson3.crop(x, settings.size).clamp(-1, 1).cpu()


@tools.section
def show_labels():
    denoiser, settings = load_demo_model()
    n, rows = len(settings.classes), 4
    if n == 1:
        return print("   this section needs at least two classes")
    label = torch.arange(n, device=denoiser.device).repeat(rows)
    noise_ids = [(0, 0, row) for row in range(rows) for _ in range(n)]
    images = generate(denoiser, label, noise_ids)  # (rows n) 1 h w
    table = images.unflatten(0, (rows, n))
    across, down = lesson3.pixel_std(table.transpose(0, 1)), lesson3.pixel_std(table)
    subtitle = f"pixels' standard deviation: {across:.2f} across a row, {down:.2f} down a column; {settings.data}"
    title = f"The label picks the garment, the noise its look\n{subtitle}"
    titles = [name.replace(" ", "\n") for name in settings.classes]
    return tools.plot_grid(title, images, n, [f"noise {row}" for row in range(rows)], titles)


# %% 3. Guidance: a line through two predictions
# A model trained both with and without labels knows what a label changes. Its two predictions, without the label and
# with it, are two points. Classifier-free guidance (Ho and Salimans 2022) follows the line from the first to the second
# and keeps going: x0_hat = x0(label) + w · (x0(label) - x0(no label)). The garments get clearer, and fewer look odd.
# Most software's guidance_scale is 1 + w. Many papers guide the predicted noise, (x - x0_hat) / sigma.
#
# But guidance waits until the noise is down to GUIDED_BELOW (Kynkäänniemi et al. 2024; see section 4), so the first 7
# of 14 steps need only one prediction each. A network trained for longer needs less guidance (docs/measurements.md).
GUIDANCE, GUIDANCE_LONG = 1.4, 0.7  # measured after 180,000 and 1,440,000 images; the switch at 600,000 is a guess
GUIDED_BELOW = 3  # sigma


def choose_guidance(images_seen):
    """The guidance w for a network trained on that many images."""
    return GUIDANCE if images_seen < 600_000 else GUIDANCE_LONG


def guide(denoiser, guidance, below=GUIDED_BELOW):
    """The guided denoiser, denoise(x, sigma, label); one batched call makes both predictions. guidance: w; 0 gives the
    prediction with the label, -1 the one without. below: w is 0 above this sigma (the guidance interval)."""

    def denoise(x, sigma, label):
        if guidance == 0 or sigma > below:
            return denoiser(x, sigma, label)
        both_labels = torch.cat([label, torch.full_like(label, denoiser.network.n_classes)])
        with_label, without = denoiser(torch.cat([x, x]), sigma, both_labels).chunk(2)
        return with_label + guidance * (with_label - without)

    return denoise


def states_on_the_way(denoiser, settings, label, sigmas=(20, 1, 0.1)):
    """The states (sigma, x, x0_hat) of a sampling run with these labels `(n,)`, closest to the given noise levels."""
    noise = lesson3.draw_noise(settings, [(0, int(each), 0) for each in label], denoiser.device)
    *states, _ = lesson3.sample_dpm(functools.partial(denoiser, label=label), noise, lesson3.noise_levels())
    return [min(states, key=lambda state: abs(math.log(state[0] / sigma))) for sigma in sigmas]


@tools.section
def show_line():
    denoiser, settings = load_demo_model()
    n = len(settings.classes)
    label = torch.arange(n, device=denoiser.device)
    ((sigma, x, _),) = states_on_the_way(denoiser, settings, label, [8])
    weights = {"no label": -1, "label": 0, "guidance 0.5": 0.5, "guidance 1": 1, "guidance 3": 3}
    points = [guide(denoiser, w, math.inf)(x, sigma, label) for w in weights.values()]
    away = [f"{(point - points[1]).square().mean().sqrt():.2f}" for point in points]
    print(f"   RMS distance from the prediction with the label, at guidance -1, 0, 0.5, 1, 3: {', '.join(away)}")
    images = lesson3.crop(torch.cat(points), settings.size).cpu()
    title = f"Guidance extends the line from no label to label\npredicting x0 at sigma {sigma:.2g}; {settings.data}"
    return tools.plot_grid(title, images, n, weights, [name.replace(" ", "\n") for name in settings.classes])


# %% 4. How strong, and from when
# At high noise, the network decides a garment's rough shape and brightness. Guidance from the start makes the garments
# of a class brighter and more alike. If it waits until sigma is down to 3, they vary as much as without guidance, even
# with w = 3 (measured in pixels, on only four garments of each class). More is not always better: too much guidance
# makes the classes clear, but the garments less realistic (docs/measurements.md).
@tools.section
def show_guidance():
    denoiser, settings = load_demo_model()
    n, per_class, rows, spread = len(settings.classes), 4, [], []
    label = torch.arange(n, device=denoiser.device).repeat(per_class)
    noise_ids = [(0, i, k) for k in range(per_class) for i in range(n)]
    limit = f"for σ ≤ {GUIDED_BELOW}"
    kinds = {"guidance 0": (0, 0), f"1, {limit}": (1, GUIDED_BELOW), f"3, {limit}": (3, GUIDED_BELOW)}
    kinds["3, always"] = 3, math.inf
    for name, (w, below) in kinds.items():
        images = generate(guide(denoiser, w, below), label, noise_ids)
        rows.append(images[:n])
        spread.append(lesson3.pixel_std(images.unflatten(0, (per_class, n))))
        print(f"   {name:14}: spread within a class {spread[-1]:.2f}; mean pixel {images.mean():.2f}")
    values = f"{spread[0]:.2f} without guidance, {spread[2]:.2f} with w = 3 {limit}, {spread[3]:.2f} with w = 3 always"
    subtitle = f"spread within a class: {values}; {settings.data}"
    title = f"Guidance from the start makes garments brighter and more alike\n{subtitle}"
    return tools.plot_grid(title, torch.cat(rows), n, list(kinds))


# %% 5. From one class to another
# A label's embedding is a vector, and between two of them lie vectors that belong to no class. What does the network
# draw for "three quarters pullover, one quarter trouser"? If the change were even, each of eight steps would cover an
# eighth of the way. But the largest covers a fifth to two fifths.
def blend(denoiser, one, other, steps):
    """A copy of the denoiser whose labels 0 to steps - 1 lead evenly from class `one` to class `other`."""
    blended = copy.deepcopy(denoiser)
    rows = denoiser.network.embed_label.weight
    weights = torch.linspace(0, 1, steps, device=rows.device)[:, None]
    blended.network.embed_label = nn.Embedding.from_pretrained(torch.lerp(rows[one], rows[other], weights))
    return blended


@tools.section
def show_blend():
    denoiser, settings = load_demo_model()
    n, steps, rows, largest = len(settings.classes), 9, [], []
    if n == 1:
        return print("   this section needs at least two classes")
    pairs = ((1, 3), (2, 1), (9, 5), (7, 9), (8, 6)) if n >= 10 else [(one, (one + 1) % n) for one in range(n)]
    names = [f"{settings.classes[one]} to\n{settings.classes[other]}" for one, other in pairs]
    label = torch.arange(steps, device=denoiser.device)
    for one, other in pairs:
        rows.append(generate(blend(denoiser, one, other, steps), label, [(0, one, 0)] * steps))
        jumps = rows[-1].diff(dim=0).flatten(1).norm(dim=1)
        largest.append(float(jumps.max() / jumps.sum()))
    subtitle = f"the largest of {steps - 1} steps: {min(largest):.0%} to {max(largest):.0%} of the way; {settings.data}"
    title = f"From class to class, the change is uneven\n{subtitle}"
    return tools.plot_grid(title, torch.cat(rows), steps, names, [f"{i / (steps - 1):.0%}" for i in range(steps)])


# %% 6. What a pixel depends on
# Is any part of the image outside a pixel's receptive field? As in section 1 of 02, the gradient shows how much one
# pixel of the prediction depends on each pixel of the input, now in a trained network. At high noise, the pixel depends
# on the whole garment: the network is still deciding what to make. At low noise, mostly on its surroundings.
#
# Switching off all attention hardly changes the gradient: on the lower level one pixel stands for many, so convolutions
# reach everywhere (and a group norm averages all pixels). What attention adds is choosing by content. On Fashion-MNIST,
# ours made no clear difference; if nothing else reaches far enough, it can be vital (docs/measurements.md has both).
def without_attention(denoiser):
    """A copy of the denoiser whose attention adds nothing."""
    plain = copy.deepcopy(denoiser)
    for layer in plain.modules():
        if isinstance(layer, lesson2.AttentionBlock):
            lesson3.zero_(layer.attention.proj)
    return plain


def far_share(weights, row, column, near):
    """The share of a gradient or of attention weights `(h, w)` more than `near` positions away from (row, column)."""
    around = weights[max(0, row - near) : row + near + 1, max(0, column - near) : column + near + 1]
    return float(1 - around.sum() / weights.sum())


@tools.section
def show_reach():
    denoiser, settings = load_demo_model()
    label = torch.arange(len(settings.classes), device=denoiser.device)
    states, (height, width) = states_on_the_way(denoiser, settings, label), settings.size
    row, column, near = round(0.6 * height), round(0.35 * width), 6
    figure, axes = plt.subplots(2, 3, figsize=(7.5, 5.2))
    kinds = {"with attention": denoiser, "without attention": without_attention(denoiser)}
    for line, (name, model) in zip(axes, kinds.items(), strict=True):
        line[0].set_ylabel(name)
        for axis, (sigma, x, _) in zip(line, states, strict=True):
            gradient = lesson2.input_gradient(functools.partial(model, sigma=sigma, label=label), x, row, column).cpu()
            title = f"σ = {sigma:.2g}: {far_share(gradient, row, column, near):.0%} far"
            tools.plot_image(axis, (gradient / gradient.max()).log10(), title, vmin=-4, vmax=0)
    subtitle = f"far: over {near} pixels away; white: largest gradient, black: 1/10,000 of it; {settings.data}"
    tools.set_title(figure, f"At high noise, a pixel depends on the whole garment\n{subtitle}")
    return figure


# %% 7. Where a pixel looks
# In section 4 of 02, each pixel attended to those that look like it. What has this network learned to look for? At one
# pixel of a boot, in the shipped network's last attention layer, one of three heads attends mostly to the empty
# background. The other two attend to the boot; one of them moves closer to the pixel as the noise falls.
def catch_weights(layer, denoise, x, sigma):
    """The weights `(n, heads, h, w, h, w)` of an attention layer while denoise(x, sigma) runs."""
    caught = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].float()))
    denoise(x, sigma)
    handle.remove()
    size = caught[0].shape[2:]  # h w
    return layer.weights(caught[0]).unflatten(3, size).unflatten(2, size)


@tools.section
def show_look():
    denoiser, settings = load_demo_model()
    layer = [part for part in denoiser.network.up.modules() if isinstance(part, lesson2.AttentionBlock)][-1]
    label = torch.tensor([len(settings.classes) - 1], device=denoiser.device)
    figure, axes = plt.subplots(3, 4, figsize=(8, 6))
    for line, (sigma, x, x0_hat) in zip(axes, states_on_the_way(denoiser, settings, label), strict=True):
        looks = catch_weights(layer, functools.partial(denoiser, label=label), x, sigma)[0, :3].cpu()  # heads h w h w
        row, column = round(0.6 * looks.shape[1]), round(0.3 * looks.shape[2])
        even = far_share(torch.ones(looks.shape[3:]), row, column, 2)
        tools.plot_image(line[0], x0_hat[0, 0].cpu(), f"x0_hat, σ = {sigma:.2g}", vmin=-1, vmax=1)
        for head, (axis, look) in enumerate(zip(line[1:], looks[:, row, column], strict=False), 1):
            title = f"head {head}: {far_share(look, row, column, 2):.0%} far"
            tools.plot_image(axis, look, title, cmap="gray_r", vmin=0)
            axis.plot(column, row, "s", color="tab:orange", markerfacecolor="none")
    subtitle = f"far: over two positions away; uniform weights would give {even:.0%}; {settings.data}"
    tools.set_title(figure, f"Different heads look at different positions\n{subtitle}")
    return figure


# %% The command
def find_classes(text, classes):
    """The indices of the classes to sample: the one with that name or number, or all if text is None. Raises UserError
    if there is no such class, or if several differ from the text only in case."""
    if text is None:
        return list(range(len(classes)))
    for form in (str, lambda name: unicodedata.normalize("NFC", name).casefold()):
        found = [label for label, name in enumerate(classes) if form(name) == form(text)]
        if len(found) == 1:
            return found
        if found:
            raise tools.UserError(f"--class {text}: ambiguous; write {' or '.join(classes[label] for label in found)}")
    by_number = not any(name.isdecimal() for name in classes)
    if text.isdecimal() and int(text) < len(classes) and by_number:
        return [int(text)]
    numbers = f", or a number from 0 to {len(classes) - 1}" if by_number else ""
    raise tools.UserError(f"--class {text}: must be one of {', '.join(classes)}{numbers}")


def parse_options():
    parser, group = tools.make_run_parser(__file__, __doc__, lesson3.PRESETS)
    parser.add_argument("--class", dest="class_name", metavar="NAME-OR-ID", help="sample this class only")
    default = f"{GUIDANCE:g}, or {GUIDANCE_LONG:g} after 600,000 training images"
    guidance = tools.number(float, 0, 100)
    parser.add_argument("--guidance", metavar="W", type=guidance, help=f"guidance strength (default: {default})")
    group.add_argument("--pretrained", action="store_true", help="sample from the shipped weights")
    parser.set_defaults(n=10, steps=lesson3.STEPS)
    options = tools.parse_run_options(parser)
    if options.pretrained and options.out == Path(parser.get_default("out")):
        options.out = tools.RUNS / "pretrained"  # never overwrite the user's own samples
    return options


def main():
    options = parse_options()
    path = PRETRAINED if options.pretrained else options.out / "checkpoint.pt"
    if options.show:
        os.environ["LESSON_RUN"] = str(options.out)
        tools.run_sections(globals(), options.out / "lesson")
        return
    if options.class_name is not None and not options.sample_only:  # better to know before training
        find_classes(options.class_name, tools.load_data(options.data, "train", options.data_dir).classes)

    def choose(settings):
        return choose_guidance(settings.images_seen) if options.guidance is None else options.guidance

    def guided(denoiser, settings):
        return guide(denoiser, choose(settings))

    denoiser, settings = lesson3.train_or_load(options, path, make_network, guided, drop_labels)
    wanted = find_classes(options.class_name, settings.classes)
    noise_ids = [(options.seed, label, index) for label in wanted for index in range(options.n)]
    samples = lesson3.sample_images(guided(denoiser, settings), noise_ids, settings, options.steps, denoiser.device)
    title = f"{settings.title}, {options.steps} steps, guidance {choose(settings):g}"
    if options.class_name is None:
        lesson3.save_samples(options.out, title, samples, settings.classes, options.n)
    else:
        lesson3.save_samples(options.out, f"{settings.classes[wanted[0]]}\n{title}", samples, columns=8)


if __name__ == "__main__":
    tools.run_command(main)
