"""Share of the weights under Kronecker blocks in models of other packages, tiny.

    python benchmarks/model_coverage.py [--models llama t5 ...]

Every model is built with small sizes and random weights, takes two training steps with
EKFAC, and says how many of its parameters' elements are in Kronecker or exact blocks
that have statistics after them; the rest is trained by its diagonal second moment.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# transformers must not import a torchvision that does not fit this torch.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
import transformers  # noqa: E402

from ekfac import EKFAC  # noqa: E402

Batch = dict[str, Tensor]
Built = tuple[nn.Module, Batch]
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def language(name: str, **options: Any) -> Built:
    """Return a causal language model and a batch of tokens."""
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(1, 64, (4, 12))
    return model, {"input_ids": ids, "labels": ids}


def masked(name: str) -> Built:
    """Return a masked language model and a batch of tokens."""
    config = getattr(transformers, f"{name}Config")(**COMMON)
    model = transformers.AutoModelForMaskedLM.from_config(config)
    ids = torch.randint(1, 64, (4, 12))
    return model, {"input_ids": ids, "labels": ids}


def sequence_to_sequence(name: str, **options: Any) -> Built:
    """Return an encoder and decoder and a batch of tokens."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, pad_token_id=0, decoder_start_token_id=1, **options
    )
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    ids = torch.randint(1, 64, (4, 12))
    return model, {"input_ids": ids, "labels": ids}


def images(name: str, **options: Any) -> Built:
    """Return an image classifier and a batch of images."""
    config = getattr(transformers, f"{name}Config")(num_labels=4, **options)
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    return model, {
        "pixel_values": torch.randn(4, 3, 32, 32),
        "labels": torch.arange(4),
    }


def whisper() -> Built:
    """Return a speech recogniser and a batch of spectrograms."""
    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))
    }
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=32,
        num_mel_bins=8,
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
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {
        "input_features": torch.randn(4, 8, 32),
        "labels": torch.randint(1, 64, (4, 10)),
    }


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
EXPERTS = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 48}
MODELS: dict[str, Callable[[], Built]] = {
    "gpt2": lambda: language("GPT2", n_embd=32, n_layer=2, n_head=2, n_positions=32),
    "llama": lambda: language("Llama"),
    "mistral": lambda: language("Mistral"),
    "gemma": lambda: language("Gemma"),
    "qwen2": lambda: language("Qwen2"),
    "mixtral": lambda: language("Mixtral", num_local_experts=4),
    "qwen2 moe": lambda: language("Qwen2Moe", num_experts=4, **EXPERTS),
    "phi": lambda: language("Phi"),
    "opt": lambda: language("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "mamba": lambda: language("Mamba", state_size=4),
    "bert": lambda: masked("Bert"),
    "roberta": lambda: masked("Roberta"),
    "distilbert": lambda: masked("DistilBert"),
    "electra": lambda: masked("Electra"),
    "albert": lambda: masked("Albert"),
    "t5": lambda: sequence_to_sequence(
        "T5", d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2
    ),
    "bart": lambda: sequence_to_sequence(
        "Bart",
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=32,
    ),
    "whisper": whisper,
    "vit": lambda: images("ViT", **VISION),
    "beit": lambda: images("Beit", **VISION),
    "convnext": lambda: images(
        "ConvNext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2
    ),
    "swin": lambda: images(
        "Swin",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "resnet": lambda: images(
        "ResNet", hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16
    ),
    "mobilenet v2": lambda: images("MobileNetV2", image_size=32, depth_multiplier=0.35),
}


def covered(build: Callable[[], Built]) -> tuple[float, int, str]:
    """Return the share, the number of elements, and the largest rest and its reason."""
    torch.manual_seed(0)
    model, batch = build()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = EKFAC(model, lr=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    total = sum(p.numel() for p in trained.values())
    inside = {
        name
        for layer in optimizer.curvature.values()
        if layer.ready
        for name in layer.parameter_names
    }
    rest = {n: p.numel() for n, p in trained.items() if n not in inside}
    worst = max(rest, key=lambda name: rest[name], default="")
    reasons = {row.layer: row.reason for row in optimizer.describe().rows}
    why = f"{worst}: {reasons.get(worst) or 'no statistics'}" if worst else ""
    return 1 - sum(rest.values()) / total, total, why


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    chosen = parser.parse_args().models
    print(f"{'model':14} {'elements':>9} {'in blocks':>9}  largest of the rest")
    print("-" * 88)
    for name in chosen:
        share, total, why = covered(MODELS[name])
        print(f"{name:14} {total:9,} {share:9.1%}  {why}", flush=True)


if __name__ == "__main__":
    main()
