"""Models of other packages at tiny size, each with data it can learn, for coverage.py.

A :class:`Problem` is made anew for every run; equal seeds give equal weights and data.
Sequences are walks on a graph of tokens, images are one of four patterns with noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, BATCHES, TOKENS = 8, 4, 48


def torchvision_operators() -> torch.library.Library | None:
    """Declare what a torchvision built for CUDA asks of a CPU build of torch.

    Returns:
        What is to be kept while torchvision is in use; ``None`` if it loads by itself.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "FRAGMENT")
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            library.define(f"{name}{signature}")
        return library
    return None


@dataclass
class Problem:
    """A model and its loss on batch ``i``.

    Attributes:
        model: What is trained.
        loss: Step -> the training loss; of models of transformers and of image
            classifiers also step and rows of the batch -> the loss of these alone.
    """

    model: nn.Module
    loss: Callable[..., Tensor]


EVERY = slice(None)


def walks(length: int = 16, start: int = 3) -> Tensor:
    """Return ``[batches, batch, length]`` tokens: of two followers, either."""
    follower = torch.randint(start, TOKENS, (TOKENS, 2))
    tokens = [torch.randint(start, TOKENS, (BATCHES, BATCH))]
    for _ in range(length - 1):
        either = torch.randint(0, 2, tokens[-1].shape)
        tokens.append(follower[tokens[-1], either])
    return torch.stack(tokens, dim=-1)


def pictures(size: int = 32) -> tuple[Tensor, Tensor]:
    """Return images ``[batches, batch, 3, size, size]`` and labels of four patterns."""
    labels = torch.randint(0, 4, (BATCHES, BATCH))
    patterns = F.interpolate(torch.randn(4, 3, 4, 4), size=size)
    return patterns[labels] + torch.randn(BATCHES, BATCH, 3, size, size), labels


# -- transformers ----------------------------------------------------------------------

SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def named(model: nn.Module, batches: Mapping[str, Tensor]) -> Problem:
    """Return the problem of a model that is called by name and returns its loss."""

    def loss(step: int, rows: slice = EVERY) -> Tensor:
        batch = {k: v[step % BATCHES][rows] for k, v in batches.items()}
        return model(**batch).loss  # type: ignore[no-any-return]

    return Problem(model, loss)


def language(name: str, **options: Any) -> Problem:
    """Return a causal language model."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    ids = walks()
    model = transformers.AutoModelForCausalLM.from_config(config)
    return named(model, {"input_ids": ids, "labels": ids})


def masked(name: str) -> Problem:
    """Return a masked language model: a fifth of the tokens is to be guessed."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES)
    ids = walks()
    hidden = torch.rand(ids.shape) < 0.2
    model = transformers.AutoModelForMaskedLM.from_config(config)
    labels = ids.masked_fill(~hidden, -100)
    return named(model, {"input_ids": ids.masked_fill(hidden, 2), "labels": labels})


def t5() -> Problem:
    """Return an encoder and decoder that repeats its input."""
    import transformers

    config = transformers.T5Config(
        vocab_size=TOKENS,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    ids = walks()
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    return named(model, {"input_ids": ids, "labels": ids})


def whisper() -> Problem:
    """Return a speech recogniser of spectrograms in which tokens are frequencies."""
    import transformers

    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    }
    config = transformers.WhisperConfig(
        vocab_size=TOKENS,
        d_model=64,
        num_mel_bins=TOKENS,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        begin_suppress_tokens=None,
        suppress_tokens=None,
        **sizes,
    )
    ids = walks()
    sound = F.one_hot(ids, TOKENS).float().repeat_interleave(2, dim=2).mT
    sound = sound + 0.1 * torch.randn(sound.shape)
    model = transformers.WhisperForConditionalGeneration(config)
    return named(model, {"input_features": sound, "labels": ids})


def classifier(name: str, **options: Any) -> Problem:
    """Return an image classifier of transformers."""
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=4, **options)
    images, labels = pictures()
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    return named(model, {"pixel_values": images, "labels": labels})


def lora() -> Problem:
    """Return GPT-2 of which LoRA's matrices alone are trained."""
    import peft

    whole = language("GPT2", n_embd=64, n_layer=2, n_head=4, n_positions=32)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"])
    model = peft.get_peft_model(whole.model, config)
    ids = walks()
    return named(model, {"input_ids": ids, "labels": ids})


# -- images ----------------------------------------------------------------------------


def images(model: nn.Module, size: int = 32) -> Problem:
    """Return the problem of a model from images to logits."""
    x, y = pictures(size)

    def loss(step: int, rows: slice = EVERY) -> Tensor:
        i = step % BATCHES
        return F.cross_entropy(model(x[i][rows]), y[i][rows])

    return Problem(model, loss)


def timm(name: str, **options: Any) -> Problem:
    """Return a classifier of timm."""
    import timm as package

    return images(package.create_model(name, num_classes=4, **options))


def efficientnet() -> Problem:
    """Return timm's EfficientNet at a quarter of its width."""
    from timm.models import efficientnet as package

    return images(
        package._gen_efficientnet("efficientnet_b0", 0.25, 0.4, num_classes=4)
    )


def mobilenet() -> Problem:
    """Return timm's small MobileNetV3 at half its width."""
    from timm.models import mobilenetv3 as package

    model = package._gen_mobilenet_v3("mobilenetv3_small_050", 0.5, num_classes=4)
    return images(model)


def mixer() -> Problem:
    """Return timm's MLP-Mixer."""
    from timm.models import mlp_mixer as package

    return images(
        package.MlpMixer(4, img_size=32, patch_size=8, num_blocks=2, embed_dim=64)
    )


class Stage(nn.Sequential):
    """A convolution with norm and activation."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(d_out),
            nn.ReLU(inplace=True),
        )


def retinanet() -> Problem:
    """Return torchvision's RetinaNet on a small backbone; a bright square is sought."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone = nn.Sequential(Stage(3, 16, 2), Stage(16, 32, 2), Stage(32, 32, 2))
    backbone.out_channels = 32  # type: ignore[assignment]
    model = RetinaNet(
        backbone,
        num_classes=3,
        min_size=64,
        max_size=64,
        anchor_generator=AnchorGenerator(((8, 16, 24),), ((0.5, 1.0, 2.0),)),
    )
    corners = torch.randint(4, 36, (BATCHES, 4, 2))
    kinds = torch.randint(1, 3, (BATCHES, 4))
    x = 0.1 * torch.rand(BATCHES, 4, 3, 64, 64)
    for b in range(BATCHES):
        for n in range(4):
            left, top = corners[b, n].tolist()
            x[b, n, kinds[b, n], top : top + 20, left : left + 20] += 0.8
    boxes = torch.cat([corners, corners + 20], dim=-1).float()

    def loss(step: int) -> Tensor:
        i = step % BATCHES
        targets = [
            {"boxes": boxes[i, n : n + 1], "labels": kinds[i, n : n + 1]}
            for n in range(4)
        ]
        return sum(model(list(x[i]), targets).values())  # type: ignore[return-value]

    return Problem(model, loss)


def segmentation() -> Problem:
    """Return torchvision's DeepLab head on a small backbone; bright pixels."""
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    backbone = nn.Sequential(Stage(3, 16, 2), Stage(16, 32, 2))
    model = nn.Sequential(
        backbone,
        DeepLabHead(32, 3, atrous_rates=(2, 4, 6)),
        nn.Upsample(scale_factor=4),
    )
    x = F.interpolate(torch.randn(BATCHES * BATCH, 3, 8, 8), size=32)
    y = (x > 0.5).long().argmax(1)

    def loss(step: int) -> Tensor:
        rows = slice(BATCH * (step % BATCHES), BATCH * (step % BATCHES + 1))
        return F.cross_entropy(model(x[rows]), y[rows])

    return Problem(model, loss)


def diffusion() -> Problem:
    """Return diffusers' UNet2DModel, which guesses the noise in images."""
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    clean, _ = pictures(16)
    noise, time = torch.randn(clean.shape), torch.rand(BATCHES, BATCH)

    def loss(step: int) -> Tensor:
        i = step % BATCHES
        t = time[i].reshape(-1, 1, 1, 1)
        x = (1 - t).sqrt() * clean[i] + t.sqrt() * noise[i]
        return F.mse_loss(model(x, (1000 * time[i]).long()).sample, noise[i])

    return Problem(model, loss)


class VAE(nn.Module):
    """A variational auto-encoder of 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative evidence bound of every image ``[N]``."""
        mean, log = self.encoder(x).chunk(2, dim=-1)
        z = mean + (0.5 * log).exp() * torch.randn_like(mean)
        wrong = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none")
        return wrong.sum(-1) - 0.5 * (1 + log - mean.square() - log.exp()).sum(-1)


def vae() -> Problem:
    """Return a VAE of noisy patterns."""
    patterns = (torch.randn(4, 64) > 0).float()
    x = patterns[torch.randint(0, 4, (BATCHES, 32))]
    x = torch.where(torch.rand(x.shape) < 0.1, 1 - x, x)
    model = VAE()
    return Problem(model, lambda step: model(x[step % BATCHES]).mean())


class GAN(nn.Module):
    """A generator and a critic, trained together through a reversed gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(), nn.Linear(32, 1))

    def forward(self, real: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the critic's logits of real and of made points."""
        made = self.generator(z)
        reversed_ = 2 * made.detach() - made
        return self.critic(real), self.critic(reversed_)


def gan() -> Problem:
    """Return a GAN of points on a circle; its loss is the critic's."""
    model = GAN()
    angle = 2 * math.pi * torch.rand(BATCHES, 32)
    real = torch.stack([angle.cos(), angle.sin()], -1)

    def loss(step: int) -> Tensor:
        ok, fake = model(real[step % BATCHES], torch.randn(32, 8))
        return F.softplus(-ok).mean() + F.softplus(fake).mean()

    return Problem(model, loss)


# -- graphs, tables, sequences ---------------------------------------------------------


class Graph(nn.Module):
    """Two layers of torch_geometric on one graph of nodes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import torch_geometric.nn as layers

        options = {"heads": 2, "concat": False} if kind.startswith("GAT") else {}
        layer = getattr(layers, kind)
        self.first, self.second = layer(32, 64, **options), layer(64, 4, **options)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Return the nodes' logits."""
        hidden = self.first(x, edges).relu()
        return self.second(hidden, edges)  # type: ignore[no-any-return]


def graph(kind: str) -> Problem:
    """Return a graph network; neighbours mostly have the same label."""
    model = Graph(kind)
    labels = torch.randint(0, 4, (120,))
    x = torch.randn(4, 32)[labels] + 2 * torch.randn(120, 32)
    pairs = torch.randint(0, 120, (2, 2000))
    alike = labels[pairs[0]] == labels[pairs[1]]
    edges = pairs[:, alike | (torch.rand(2000) < 0.1)]
    return Problem(model, lambda step: F.cross_entropy(model(x, edges), labels))


class DLRM(nn.Module):
    """Embedding bags and products of features, as recommendation models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(40, 16, mode="sum") for _ in range(3))
        self.below = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.above = nn.Sequential(nn.Linear(22, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Return the logits ``[N]`` of a click."""
        x = self.below(dense)
        features = torch.stack(
            [x, *(b(s) for b, s in zip(self.bags, sparse, strict=True))], dim=1
        )
        products = features @ features.mT
        i, j = torch.triu_indices(4, 4, 1)
        return self.above(torch.cat([x, products[:, i, j]], 1))[:, 0]  # type: ignore[no-any-return]


def clicks(model: nn.Module) -> Problem:
    """Return a recommendation model with clicks that depend on the first table."""
    dense = torch.randn(BATCHES, 64, 8)
    sparse = torch.randint(0, 40, (BATCHES, 3, 64, 4))
    y = (torch.randn(40)[sparse[:, 0]].sum(-1) + dense[..., 0] > 0).float()

    def loss(step: int) -> Tensor:
        i = step % BATCHES
        logits = model(dense[i], sparse[i])
        return F.binary_cross_entropy_with_logits(logits, y[i])

    return Problem(model, loss)


def dlrm() -> Problem:
    """Return a recommendation model of products of features."""
    return clicks(DLRM())


class Recurrent(nn.Module):
    """An LSTM language model."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(TOKENS, 32), nn.LSTM(32, 64, 2)
        self.head = nn.Linear(64, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits ``[N, L, V]``."""
        hidden, _ = self.lstm(self.words(ids).transpose(0, 1))
        return self.head(hidden.transpose(0, 1))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A language model of torch's own transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, 64)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits ``[N, L, V]``, of a head tied to the embedding."""
        x = self.words(ids) + self.places[:, : ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.layers(x, mask=mask, is_causal=True)
        return F.linear(x, self.words.weight) / 8


def next_token(model: nn.Module) -> Problem:
    """Return the problem of a model from tokens to logits."""
    ids = walks()

    def loss(step: int) -> Tensor:
        x = ids[step % BATCHES]
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    return Problem(model, loss)


# -- fields, equations, control --------------------------------------------------------


class NeRF(nn.Module):
    """Colour and density along rays, of encoded positions."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
        )
        self.density, self.colour = nn.Linear(64, 1), nn.Linear(64, 3)

    def forward(self, points: Tensor) -> Tensor:
        """Return colours ``[rays, 3]`` of points ``[rays, samples, 3]``."""
        scaled = points.unsqueeze(-1) * 2.0 ** torch.arange(6)
        x = torch.cat([scaled.sin(), scaled.cos()], -1).flatten(-2)
        hidden = self.trunk(x)
        opaque = 1 - (-F.softplus(self.density(hidden)) / 8).exp()
        left = torch.cumprod(1 - opaque + 1e-6, dim=-2)
        return (opaque * left * self.colour(hidden).sigmoid()).sum(-2)


def nerf() -> Problem:
    """Return a radiance field that learns a coloured ball."""
    model = NeRF()
    points = 2 * torch.rand(BATCHES, 64, 16, 3) - 1
    colour = (points.mean(2) + 0.5).clamp(0, 1)

    def loss(step: int) -> Tensor:
        i = step % BATCHES
        return F.mse_loss(model(points[i]), colour[i])

    return Problem(model, loss)


class Siren(nn.Module):
    """A network of sines (Sitzmann et al. 2020, section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (2, 64, 64, 64)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.last = nn.Linear(64, 1)
        with torch.no_grad():
            for i, layer in enumerate([*self.layers, self.last]):
                d = layer.in_features
                bound = 1 / d if i == 0 else math.sqrt(6 / d) / 30
                layer.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return values ``[N, 1]`` of points ``[N, 2]``."""
        for layer in self.layers:
            x = (30 * layer(x)).sin()
        return self.last(x)  # type: ignore[no-any-return]


def siren() -> Problem:
    """Return a SIREN that learns an image of waves."""
    model, axis = Siren(), torch.linspace(-1, 1, 24)
    x = torch.cartesian_prod(axis, axis)
    y = ((9 * x[:, :1]).sin() * (5 * x[:, 1:]).cos()).sign()
    return Problem(model, lambda step: F.mse_loss(model(x), y))


def pinn() -> Problem:
    """Return a network for ``u'' = -sin x`` with ``u(0) = u(pi) = 0``."""
    model = nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    inner, ends = math.pi * torch.rand(BATCHES, 64, 1), torch.tensor([[0.0], [math.pi]])

    def loss(step: int) -> Tensor:
        x = inner[step % BATCHES].clone().requires_grad_()
        u = model(torch.cat([x, ends]))
        first = torch.autograd.grad(u[:-2].sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        return (second + x.sin()).square().mean() + u[-2:].square().mean()

    return Problem(model, loss)


class Actor(nn.Module):
    """A policy and a value of the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32))
        self.policy, self.value = nn.Linear(32, 4), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities ``[N, 4]`` and values ``[N]``."""
        x = self.trunk(x).tanh()
        return self.policy(x).log_softmax(-1), self.value(x)[:, 0]


def ppo() -> Problem:
    """Return the clipped loss of PPO on actions of a random policy."""
    model = Actor()
    x = torch.randn(BATCHES, 64, 6)
    action = torch.randint(0, 4, (BATCHES, 64))
    good = (action == x[..., :4].argmax(-1)).float()

    def loss(step: int) -> Tensor:
        i = step % BATCHES
        logs, value = model(x[i])
        ratio = (logs.gather(1, action[i, :, None])[:, 0] - math.log(0.25)).exp()
        gain = good[i] - 0.25
        clipped = torch.minimum(ratio * gain, ratio.clamp(0.5, 2) * gain)
        return (value - good[i]).square().mean() - clipped.mean()

    return Problem(model, loss)


VIT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
# Package -> model -> its problem.
MODELS: dict[str, dict[str, Callable[[], Problem]]] = {
    "transformers": {
        "GPT-2": lambda: language(
            "GPT2", n_embd=64, n_layer=2, n_head=4, n_positions=32
        ),
        "BERT": lambda: masked("Bert"),
        "RoBERTa": lambda: masked("Roberta"),
        "ALBERT": lambda: masked("Albert"),
        "Llama": lambda: language("Llama"),
        "Mistral": lambda: language("Mistral"),
        "Gemma": lambda: language("Gemma"),
        "OPT": lambda: language("OPT", ffn_dim=128, word_embed_proj_dim=64),
        "Mixtral": lambda: language("Mixtral", num_local_experts=4),
        "Qwen2-MoE": lambda: language("Qwen2Moe", num_experts=4, **EXPERTS),
        "Mamba": lambda: language("Mamba", state_size=4),
        "T5": t5,
        "Whisper": whisper,
        "ViT": lambda: classifier("ViT", **VIT),
        "BEiT": lambda: classifier("Beit", **VIT),
    },
    "peft": {"LoRA of GPT-2": lora},
    "timm": {
        "ResNet": lambda: timm(
            "resnet10t", channels=(16, 32, 32, 32), stem_width=8, stem_type=""
        ),
        "ConvNeXt": lambda: timm(
            "convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 32)
        ),
        "ViT": lambda: timm(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=64,
            depth=2,
            num_heads=4,
        ),
        "Swin": lambda: timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            patch_size=4,
            window_size=4,
            embed_dim=32,
            depths=(1, 1),
            num_heads=(2, 4),
        ),
        "EfficientNet": efficientnet,
        "MobileNetV3": mobilenet,
        "MLP-Mixer": mixer,
    },
    "torchvision": {"RetinaNet": retinanet, "DeepLab": segmentation},
    "diffusers": {"UNet2DModel": diffusion},
    "torch_geometric": {
        "GCN": lambda: graph("GCNConv"),
        "SAGE": lambda: graph("SAGEConv"),
        "GAT": lambda: graph("GATConv"),
    },
    "torch": {
        "DLRM": dlrm,
        "LSTM": lambda: next_token(Recurrent()),
        "Transformer": lambda: next_token(Encoder()),
        "NeRF": nerf,
        "SIREN": siren,
        "PINN": pinn,
        "PPO": ppo,
        "GAN": gan,
        "VAE": vae,
    },
}
