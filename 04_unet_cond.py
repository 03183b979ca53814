"""Lesson 4: the U-Net gets attention and a class label, and draws the garment it is asked for.

Running it trains the conditional model, in ten minutes on two CPU cores, and draws some of each class (lecture sections
"attention in the U-Net" and "conditional model").

    python 04_unet_cond.py [--epochs E] [--data-dir DIR] [--help]
    python 04_unet_cond.py --sample-only --class "Ankle boot" --n 16
"""

# %%
import importlib

import torch
from torch import nn

lesson2 = importlib.import_module("02_attention")
MultiHeadSelfAttention = lesson2.MultiHeadSelfAttention

lesson3 = importlib.import_module("03_unet_uncond")
Saved = lesson3.Saved
TimeResBlock = lesson3.TimeResBlock
TimeUNet = lesson3.TimeUNet
UserError = lesson3.UserError
draw = lesson3.draw
get_denoiser = lesson3.get_denoiser
make_parser = lesson3.make_parser
number = lesson3.number
start = lesson3.start
zero_ = lesson3.zero_


# %% Attention after the residual block: what a convolution found here, every other pixel can now ask for.
class AttentionResBlock(TimeResBlock):
    """A residual block followed by self-attention with `out_channels // head_dim` heads."""

    def __init__(self, in_channels, out_channels, groups, embedding_dim, head_dim):
        super().__init__(in_channels, out_channels, groups, embedding_dim)
        self.attention = MultiHeadSelfAttention(out_channels, out_channels // head_dim, groups)
        zero_(self.attention.proj)

    def forward(self, x, embedding):
        """x: `(n, in_channels, h, w)`, embedding: `(n, embedding_dim)`. Returns `(n, out_channels, h, w)`."""
        return self.attention(super().forward(x, embedding))


class SavedAttentionResBlock(Saved, AttentionResBlock):
    pass


# %% The label: one more row of numbers to learn for each class, added to the embedding of time.
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
        (embedding,) = super().embed(time, label)
        if label is None:
            label = torch.full((len(embedding),), self.n_classes, device=embedding.device)
        return (embedding + self.embed_label(label),)

    @classmethod
    def from_preset(cls, preset, n_classes):
        first = preset.patch**2, preset.widths, preset.depth, preset.groups
        return cls(*first, preset.attention_levels, preset.head_dim, n_classes)

    def training_label(self, label, generator):
        """The labels, but "no label" in one of ten cases: that is what guidance needs to know as well."""
        dropped = torch.rand(len(label), generator=generator, device=label.device) < 0.1
        return label.masked_fill(dropped, self.n_classes)


# %% Guidance (Ho and Salimans 2022): a model that has also learned to do without the label knows what the label
# changes. Going further in that direction gives clearer garments of the class, and fewer odd ones.
def guide(denoiser, label, guidance):
    """denoise(x, sigma) for `sample`: x0(label) + guidance · (x0(label) - x0(no label)), in one batched call.

    label: int64 `(n,)`. guidance: 0 is the model with the label as it is, -1 the one without.
    """
    no_label = torch.full_like(label, denoiser.network.n_classes)

    def denoise(x, sigma):
        if guidance == 0:
            return denoiser(x, sigma, label)
        both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([label, no_label]))
        with_label, without = both.chunk(2)
        return with_label + guidance * (with_label - without)

    return denoise


# %% Lesson 4 as a command
def find_class(text, classes):
    """The number of a class from its name or number. Raises UserError where there is no such class."""
    names = [name.lower() for name in classes]
    if text.lower() in names:
        return names.index(text.lower())
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise UserError(f"--class {text}: must be one of {', '.join(classes)}, or a number from 0 to {len(classes) - 1}")


def main(options):
    def find_wanted(run):
        return range(len(run.classes)) if options.only is None else [find_class(options.only, run.classes)]

    denoiser, run = get_denoiser(options, CondUNet, check=find_wanted)
    wanted = find_wanted(run)
    starts = [(options.seed, number, index) for number in wanted for index in range(options.n)]
    label = torch.tensor([number for _, number, _ in starts], device=options.device)
    title = f"{run.title}, {options.steps} steps, guidance {options.guidance:g}"

    def make_denoise(chosen):
        return guide(denoiser, label[chosen], options.guidance)

    if options.only is None:
        draw(make_denoise, starts, run, options, title, rows=run.classes, columns=options.n)
    else:
        draw(make_denoise, starts, run, options, f"{run.classes[wanted[0]]}: {title}", columns=8)


if __name__ == "__main__":
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--class", dest="only", metavar="NAME-OR-ID", help="draw this class only (all)")
    guidance = number(float, -100, "a number from -100 up")
    parser.add_argument("--guidance", metavar="W", type=guidance, default=0.5, help="(%(default)s)")
    parser.set_defaults(n=10)
    start(parser, main)
