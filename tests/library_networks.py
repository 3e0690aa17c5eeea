"""Networks of the libraries that people take them from, small or at a small input, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teachers import make_batch


@dataclass(frozen=True)
class LibraryNetwork:
    """A network of a library.

    Attributes:
        package: What must be installed.
        make: Returns a new network.
        inputs: Makes a batch of so many samples, of a floating point dtype.
    """

    package: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.dtype], tuple[Tensor, ...]]


def _images(side: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (make_batch(batch, (3, side, side), dtype=dtype),)


def _words(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Token ids."""
    return (torch.randint(0, 30, (batch, 9), generator=torch.Generator().manual_seed(0)),)


def _text(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Token ids and an attention mask."""
    generator = torch.Generator().manual_seed(1)
    return *_words(batch, dtype), (torch.rand(batch, 9, generator=generator) > 0.2).long()


def _two_texts(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Token ids and an attention mask of an encoder, and token ids of a decoder."""
    words, mask = _text(batch, dtype)
    return words, mask, words.flip(1)[:, :5]


def _sound(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (make_batch(batch, (1200,), dtype=dtype),)


def _timm(name: str) -> nn.Module:
    model: nn.Module = importlib.import_module("timm").create_model(name)
    return model


def _transformers(model: str, config: str, **numbers: Any) -> nn.Module:
    transformers = importlib.import_module("transformers")
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**numbers))
    return made


def _segmentation(architecture: str, encoder: str) -> nn.Module:
    smp = importlib.import_module("segmentation_models_pytorch")
    made: nn.Module = smp.create_model(architecture, encoder, encoder_weights=None, classes=3)
    return made


def _yolo(name: str) -> nn.Module:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    kind = tasks.ClassificationModel if name.endswith("-cls") else tasks.DetectionModel
    made: nn.Module = kind(f"{name}.yaml", verbose=False)
    return made


def _monai(name: str, **numbers: Any) -> nn.Module:
    made: nn.Module = getattr(importlib.import_module("monai.networks.nets"), name)(**numbers)
    return made


_TIMM = {
    **dict.fromkeys(
        [
            "cspresnet50",
            "eca_nfnet_l0",
            "edgenext_xx_small",
            "fastvit_t8",
            "ghostnetv2_100",
            "hgnetv2_b0",
            "mobileone_s0",
            "nf_regnet_b0",
            "poolformer_s12",
            "repvgg_a0",
            "res2net50_14w_8s",
            "resnetv2_50x1_bit",
            "skresnet18",
            "tf_efficientnet_lite0",
            "xception41",
            "convnext_atto",
        ],
        64,
    ),
    **dict.fromkeys(
        [
            "beit_base_patch16_224",
            "deit_tiny_patch16_224",
            "mixer_s32_224",
            "vit_tiny_patch16_224",
            "xcit_nano_12_p16_224",
        ],
        224,
    ),
}
_TRANSFORMERS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "resnet": (
        *("ResNetForImageClassification", "ResNetConfig", 32),
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "convnext": (
        *("ConvNextForImageClassification", "ConvNextConfig", 32),
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "vit": (
        *("ViTForImageClassification", "ViTConfig", 32),
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        | {"image_size": 32, "patch_size": 8},
    ),
    "swin": (
        *("SwinForImageClassification", "SwinConfig", 32),
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    ),
    "segformer": (
        *("SegformerForSemanticSegmentation", "SegformerConfig", 64),
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
        | {"decoder_hidden_size": 16},
    ),
}
_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}
_DECODER = _ENCODER | {"num_attention_heads": 4, "head_dim": 4, "use_cache": False, "pad_token_id": 0}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_SEQUENCES: dict[str, tuple[str, str, Callable[[int, torch.dtype], tuple[Tensor, ...]], dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _text, _ENCODER),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", _text, _ENCODER | {"embedding_size": 8}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", _text, _ENCODER | {"embedding_size": 8}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _text, _ENCODER),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", _text, _ENCODER),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", _text, _ENCODER | {"pad_token_id": 0}),
    "distilbert": (
        *("DistilBertForSequenceClassification", "DistilBertConfig", _text),
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 30, "max_position_embeddings": 16},
    ),
    "gpt2": (
        *("GPT2LMHeadModel", "GPT2Config", _words),
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 30, "n_positions": 16, "use_cache": False},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", _words, _DECODER | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _words, _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _words, _GROUPED),
    "t5": (
        *("T5ForConditionalGeneration", "T5Config", _two_texts),
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 30, "use_cache": False},
    ),
    "bart": (
        *("BartForConditionalGeneration", "BartConfig", _two_texts),
        {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 30}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16}
        | {"use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    ),
    "wav2vec2": (  # without what draws random numbers of NumPy and leaves out layers
        *("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _sound),
        _ENCODER
        | {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
        | {"apply_spec_augment": False, "layerdrop": 0.0},
    ),
}
_SEGMENTATION = [
    "unet",
    "unetplusplus",
    "fpn",
    "linknet",
    "manet",
    "pspnet",
    "pan",
    "deeplabv3",
    "deeplabv3plus",
    "upernet",
]
_ENCODERS = ["mobilenet_v2", "timm-efficientnet-b0", "densenet121"]  # beside ResNet-18, of the U-Net alone
_YOLO = ["yolov8n", "yolo11n", "yolo12n", "yolo26n", "yolov8n-cls", "yolo11n-cls"]

NETWORKS: dict[str, LibraryNetwork] = {
    **{
        f"timm/{name}": LibraryNetwork("timm", partial(_timm, name), partial(_images, side))
        for name, side in sorted(_TIMM.items())
    },
    **{
        f"transformers/{name}": LibraryNetwork(
            "transformers", partial(_transformers, model, config, num_labels=4, **numbers), partial(_images, side)
        )
        for name, (model, config, side, numbers) in _TRANSFORMERS.items()
    },
    **{
        f"transformers/{name}": LibraryNetwork(
            "transformers", partial(_transformers, model, config, num_labels=4, **numbers), inputs
        )
        for name, (model, config, inputs, numbers) in _SEQUENCES.items()
    },
    **{
        f"segmentation_models_pytorch/{architecture}-{encoder}": LibraryNetwork(
            "segmentation_models_pytorch",
            partial(_segmentation, architecture, encoder),
            partial(_images, 128 if architecture == "pan" else 64),  # whose pyramid pools the last map three times
        )
        for architecture, encoder in [*((a, "resnet18") for a in _SEGMENTATION), *(("unet", e) for e in _ENCODERS)]
    },
    **{
        f"ultralytics/{name}": LibraryNetwork("ultralytics", partial(_yolo, name), partial(_images, 64))
        for name in _YOLO
    },
    "monai/unet": LibraryNetwork(
        "monai",
        partial(
            _monai,
            "UNet",
            spatial_dims=2,
            in_channels=3,
            out_channels=2,
            channels=(4, 8, 16),
            strides=(2, 2),
            num_res_units=2,
        ),
        partial(_images, 32),
    ),
    "monai/basicunet": LibraryNetwork(
        "monai",
        partial(_monai, "BasicUNet", spatial_dims=2, in_channels=3, out_channels=2, features=(8, 8, 16, 16, 32, 8)),
        partial(_images, 64),
    ),
}
"""By library and name."""
