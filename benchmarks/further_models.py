"""Further models of other packages at tiny size: what share of them is in blocks.

Beside those of ``coverage_models.py``, which are trained too. They bring what those do
not: weights that torch's attention function is given (WavLM), matrices in three
dimensions (XLNet), whole tables of embeddings (DETR), positions in two dimensions
(SAM), layers whose ``forward`` is called (ChebConv), lists of parameters (DCN).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from coverage_models import (
    BATCH,
    BATCHES,
    EVERY,
    SIZES,
    TOKENS,
    VIT,
    Problem,
    classifier,
    clicks,
    images,
    language,
    named,
    pictures,
    walks,
)
from torch import Tensor, nn

STAGES: dict[str, Any] = {"embed_dim": (32, 32), "depths": (1, 1), "stem_width": 8}


def of_tokens(head: str, name: str, without: Iterable[str] = (), **options: Any) -> Any:
    """Return a model of tokens that names some sizes in its own way.

    Args:
        head: What it predicts: ``"CausalLM"`` or ``"MaskedLM"``.
        name: Of its configuration.
        without: Sizes that it does not have.
        options: Other ones.
    """
    import transformers

    sizes = {k: v for k, v in SIZES.items() if k not in without}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    ids = walks()
    if head == "CausalLM":
        return named(model, {"input_ids": ids, "labels": ids})
    hidden = torch.rand(ids.shape) < 0.2
    labels = ids.masked_fill(~hidden, -100)
    return named(model, {"input_ids": ids.masked_fill(hidden, 2), "labels": labels})


def speech(name: str, **options: Any) -> Problem:
    """Return a recogniser of sounds, with the loss of CTC."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
        conv_dim=(32, 32),
        conv_stride=(5, 4),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=2,
        num_conv_pos_embedding_groups=8,
        mask_time_prob=0.0,
        layerdrop=0.0,
        **options,
    )
    model = getattr(transformers, f"{name}ForCTC")(config)
    labels = torch.randint(3, TOKENS, (BATCHES, BATCH, 6))
    sounds = torch.randn(BATCHES, BATCH, 800)
    return named(model, {"input_values": sounds, "labels": labels})


def clip() -> Problem:
    """Return CLIP: images and texts that belong together."""
    import transformers

    text = {k: v for k, v in SIZES.items() if "head" not in k}
    config = transformers.CLIPConfig(
        text_config={**text, "num_attention_heads": 4},
        vision_config=VIT,
        projection_dim=32,
    )
    model, ids, (x, _) = transformers.CLIPModel(config), walks(), pictures()

    def loss(step: int, rows: slice = EVERY) -> Tensor:
        i = step % BATCHES
        out = model(ids[i][rows], x[i][rows], return_loss=True)
        return out.loss  # type: ignore[no-any-return]

    return Problem(model, loss)


def sam() -> Problem:
    """Return SAM: masks of noise at a point."""
    import transformers

    vision = {
        "hidden_size": 64,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 128,
        "num_pos_feats": 16,
    }
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 8}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4}
    config = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config={**prompt, "mask_input_channels": 4},
        mask_decoder_config={**decoder, "iou_head_hidden_dim": 32},
    )
    model = transformers.SamModel(config)
    x, points = torch.randn(BATCHES, 2, 3, 64, 64), 64 * torch.rand(BATCHES, 2, 1, 1, 2)
    masks = torch.randn(BATCHES, 2, 1, 3, 32, 32)

    def loss(step: int, rows: slice = EVERY) -> Tensor:
        i = step % BATCHES
        made = model(pixel_values=x[i][rows], input_points=points[i][rows]).pred_masks
        return F.mse_loss(made, masks[i][rows])

    return Problem(model, loss)


def detr() -> Problem:
    """Return DETR on a small ResNet, with one box an image."""
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    }
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        use_pretrained_backbone=False,
        num_queries=6,
        d_model=64,
        num_labels=4,
        **sides,
    )
    model, (x, y) = transformers.DetrForObjectDetection(config), pictures(64)
    box = torch.tensor([[0.5, 0.5, 0.3, 0.3]])

    def loss(step: int, rows: slice = EVERY) -> Tensor:
        i = step % BATCHES
        labels = [{"class_labels": y[i][n : n + 1], "boxes": box} for n in range(BATCH)]
        out = model(pixel_values=x[i][rows], labels=labels[rows])
        return out.loss  # type: ignore[no-any-return]

    return Problem(model, loss)


def timm(name: str, size: int = 32, **options: Any) -> Problem:
    """Return a classifier of timm for images of a size."""
    import timm as package

    return images(package.create_model(name, num_classes=4, **options), size)


class Nodes(nn.Module):
    """Two layers of torch_geometric."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = layer(32, 64), layer(64, 4)

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        """Return the nodes' logits."""
        hidden = self.first(x, *edges).relu()
        return self.second(hidden, *edges)  # type: ignore[no-any-return]


def nodes(kind: str, *arguments: Any, typed: bool = False, **options: Any) -> Problem:
    """Return a graph network on one graph of 120 nodes."""
    import torch_geometric.nn as layers

    own = getattr(layers, kind)
    model = Nodes(lambda d_in, d_out: own(d_in, d_out, *arguments, **options))
    return on_graph(model, typed)


def on_graph(model: nn.Module, typed: bool = False) -> Problem:
    """Return the problem of a network of nodes, and of types of edges if asked for."""
    labels = torch.randint(0, 4, (120,))
    x = torch.randn(4, 32)[labels] + 2 * torch.randn(120, 32)
    edges: tuple[Tensor, ...] = (torch.randint(0, 120, (2, 800)),)
    edges += (torch.randint(0, 3, (800,)),) if typed else ()
    return Problem(model, lambda step: F.cross_entropy(model(x, *edges), labels))


def gin() -> Problem:
    """Return torch_geometric's GIN, whose layers hold a network each."""
    import torch_geometric.nn as layers

    def layer(d_in: int, d_out: int) -> nn.Module:
        own = nn.Sequential(nn.Linear(d_in, 64), nn.ReLU(), nn.Linear(64, d_out))
        return layers.GINConv(own, train_eps=True)

    return on_graph(Nodes(layer))


class Cross(nn.Module):
    """Embedding bags and low-rank products of features, as torchrec's DCN has them."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(40, 16, mode="sum", include_last_offset=True)
            for _ in range(3)
        )
        self.below, self.above = nn.Linear(8, 16), nn.Linear(64, 1)
        V, W, b = ((8, 64), (64, 8), (64,))
        self.V = nn.ParameterList(nn.Parameter(0.1 * torch.randn(V)) for _ in range(2))
        self.W = nn.ParameterList(nn.Parameter(0.1 * torch.randn(W)) for _ in range(2))
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(b)) for _ in range(2))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Return the logits ``[N]`` of a click."""
        ends = torch.arange(0, 4 * len(dense) + 1, 4)
        rows = [b(s.flatten(), ends) for b, s in zip(self.bags, sparse, strict=True)]
        x = first = torch.cat([self.below(dense).relu(), *rows], 1)
        for V, W, b in zip(self.V, self.W, self.b, strict=True):
            x = first * (F.linear(F.linear(x, V), W) + b) + x
        return self.above(x)[:, 0]  # type: ignore[no-any-return]


def dcn() -> Problem:
    """Return a recommendation model of crossed features."""
    return clicks(Cross())


LATENT = {  # DeepSeek's attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
STATES = {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2}
OWN = ("head_dim", "max_position_embeddings")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
FUNNEL = {
    "without": (*OWN, "hidden_size", "intermediate_size", "num_hidden_layers"),
    "d_model": 64,
    "d_inner": 128,
    "n_head": 4,
    "d_head": 16,
    "block_sizes": [1, 1],
    "num_decoder_layers": 1,
}
BERTS = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
PNA = {"aggregators": ["mean", "max", "std"], "scalers": ["identity", "amplification"]}
# Package -> model -> its problem.
FURTHER: dict[str, dict[str, Callable[[], Problem]]] = {
    "transformers": {
        "Gemma 3": lambda: language("Gemma3Text", sliding_window=8),
        "Phi-3": lambda: language("Phi3"),
        "DeepSeek-V3": lambda: language("DeepseekV3", **LATENT),
        "GPT-OSS": lambda: language(
            "GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=8
        ),
        "Mamba-2": lambda: language("Mamba2", **STATES, expand=2, chunk_size=8),
        "RWKV": lambda: language("Rwkv", attention_hidden_size=64, context_length=32),
        "XLNet": lambda: of_tokens(
            *("CausalLM", "XLNet", OWN), d_model=64, n_layer=2, n_head=4, d_inner=128
        ),
        "Funnel": lambda: of_tokens("MaskedLM", "Funnel", **FUNNEL),
        "DeBERTa-v2": lambda: of_tokens(
            "MaskedLM", "DebertaV2", **BERTS, max_relative_positions=16
        ),
        "MobileBERT": lambda: of_tokens(
            *("MaskedLM", "MobileBert"), embedding_size=32, intra_bottleneck_size=32
        ),
        "ConvBERT": lambda: of_tokens(
            *("MaskedLM", "ConvBert"), embedding_size=64, conv_kernel_size=3
        ),
        "Wav2Vec 2": lambda: speech("Wav2Vec2"),
        "WavLM": lambda: speech("WavLM"),
        "CLIP": clip,
        "SAM": sam,
        "DETR": detr,
        "Swin v2": lambda: classifier(
            "Swinv2",
            image_size=32,
            patch_size=4,
            embed_dim=32,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
        ),
        "DINOv2": lambda: classifier("Dinov2", **VIT),
    },
    "timm": {
        "MaxViT": lambda: timm("maxvit_rmlp_pico_rw_256", 64, img_size=64, **STAGES),
        "CoAtNet": lambda: timm(
            "coatnet_rmlp_nano_rw_224",
            64,
            img_size=64,
            embed_dim=(32, 32, 32, 32),
            depths=(1, 1, 1, 1),
            stem_width=8,
        ),
        "LeViT": lambda: timm(
            "levit_128s",
            64,
            img_size=64,
            embed_dim=(32, 48, 64),
            num_heads=(2, 3, 4),
            key_dim=8,
            depth=(1, 1, 1),
        ),
        "EfficientFormer": lambda: timm(
            "efficientformerv2_s0",
            64,
            img_size=64,
            embed_dims=(16, 32, 32, 32),
            depths=(1, 1, 1, 1),
        ),
        "NaFlexViT": lambda: timm(
            "naflexvit_base_patch16_gap",
            embed_dim=64,
            depth=2,
            num_heads=4,
            patch_size=8,
            pos_embed_grid_size=(4, 4),
        ),
        "CaiT": lambda: timm("cait_xxs24_224", **SMALL),
        "XCiT": lambda: timm("xcit_nano_12_p16_224", **SMALL),
    },
    "torch_geometric": {
        "GIN": gin,
        "TransformerConv": lambda: nodes("TransformerConv", heads=2, concat=False),
        "PNA": lambda: nodes("PNAConv", **PNA, deg=torch.full((20,), 6)),
        "GATv2": lambda: nodes("GATv2Conv", heads=2, concat=False),
        "ChebConv": lambda: nodes("ChebConv", 3),
        "TAGConv": lambda: nodes("TAGConv"),
        "RGCN": lambda: nodes("RGCNConv", 3, typed=True),
    },
    "torch": {"DCN": dcn},
}
