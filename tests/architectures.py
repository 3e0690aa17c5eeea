"""The zoo: small networks, each with its own way of moving channels around.

Every test of the core that should hold for *any* network runs over :data:`ZOO`. The networks stand in ``zoo_*.py``.
Teachers and big students are made once in a process, by :func:`teachers_of` and :func:`merged`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

import zoo_attention as attention
import zoo_concatenating as cat
import zoo_grouped as grouped
import zoo_heads as heads
import zoo_mixing as mixing
import zoo_plain as plain
import zoo_residual as residual
import zoo_unusual as unusual
from fastmerge import BigStudent
from teachers import make_batch, make_teachers

IMAGE = (3, 8, 8)
BATCH = 6


@dataclass(frozen=True)
class Architecture:
    """One network of the zoo.

    Attributes:
        name: the test's id.
        make: returns a new network.
        example_shape: shape of one sample, or one shape per input.
        stochastic: whether the network itself draws numbers in training mode (dropout).
    """

    name: str
    make: Callable[[], nn.Module]
    example_shape: tuple[int, ...] | tuple[tuple[int, ...], ...] = IMAGE
    stochastic: bool = False

    def inputs(self, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """One tensor (batch, *shape) per input of the network, from :func:`teachers.make_batch`."""
        several = isinstance(self.example_shape[0], tuple)
        shapes = self.example_shape if several else (self.example_shape,)
        return tuple(make_batch(batch, shape, seed + i, dtype) for i, shape in enumerate(shapes))


ZOO = [
    Architecture("resnet_padded_shortcut", partial(residual.ResNet, shortcut="pad")),
    Architecture("resnet_projected_shortcut", partial(residual.ResNet, shortcut="project")),
    Architecture("resnet_preactivation", residual.PreActivationResNet),
    Architecture("resnet_squeeze_excitation", partial(residual.ResNet, shortcut="project", excite=True)),
    Architecture("resnet_odd_widths", partial(residual.ResNet, shortcut="project", widths=(5, 7))),
    Architecture("resnext", residual.ResNeXt),
    Architecture("resnet_scaled_without_norm", residual.ScaledResidual),
    Architecture("resnet_mixed_norms", residual.MixedNorms),
    Architecture("residual_mlp", residual.ResidualMLP, (5,)),
    Architecture("residual_to_output", residual.Denoiser),
    Architecture("mobilenet", grouped.MobileNet),
    Architecture("depthwise_multiplier", grouped.DepthwiseMultiplier),
    Architecture("shufflenet_v1", grouped.ShuffleNetV1),
    Architecture("shufflenet_v2", grouped.ShuffleNetV2),
    Architecture("group_norm", grouped.GroupNormed),
    Architecture("instance_norm", grouped.InstanceNormed),
    Architecture("gated_linear_unit", grouped.GatedLinearUnits),
    Architecture("shuffled_halves", grouped.ShuffledHalves),
    Architecture("pixel_shuffle", grouped.PixelShuffled),
    Architecture("densenet", cat.DenseNet),
    Architecture("unet", cat.UNet),
    Architecture("squeezenet", cat.SqueezeNet),
    Architecture("inception", cat.Inception),
    Architecture("input_concatenated", cat.InputConcatenated),
    Architecture("zero_channels", cat.ZeroChannels),
    Architecture("two_poolings", cat.TwoPoolings),
    Architecture("two_activations", cat.TwoActivations),
    Architecture("mlp", plain.MLP, (5,)),
    Architecture("sine_mlp", plain.sine_mlp, (1,)),
    Architecture("lenet", plain.LeNet, (1, 16, 16)),
    Architecture("vgg", plain.VGG, (3, 16, 16)),
    Architecture("sequential", plain.sequential),
    Architecture("dropout_modules", plain.DropoutModules, stochastic=True),
    Architecture("dropout_functional", plain.DropoutFunctional, stochastic=True),
    Architecture("inplace_relu", plain.InplaceReLU),
    Architecture("relu_statement", plain.ReLUStatement),
    Architecture("prelu", plain.prelu),
    Architecture("one_value_for_all", plain.OneValueForAll),
    Architecture("convolution_1d", plain.convolution_1d, (2, 20)),
    Architecture("convolution_3d", plain.convolution_3d, (2, 6, 6, 6)),
    Architecture("transposed", plain.transposed, (4, 4, 4)),
    Architecture("mixed_biases", plain.mixed_biases),
    Architecture("token_mlp", plain.TokenMLP, (6, 5)),
    Architecture("tuple_heads", heads.TupleHeads),
    Architecture("dict_heads", heads.DictHeads),
    Architecture("two_inputs", heads.TwoInputs, ((3, 8, 8), (4,))),
    Architecture("auxiliary_in_training", heads.AuxiliaryInTraining),
    Architecture("log_softmax", heads.LogSoftmax),
    Architecture("direct_head", heads.DirectHead),
    Architecture("layer_used_twice", unusual.LayerUsedTwice),
    Architecture("layer_used_on_input", unusual.LayerUsedOnInput),
    Architecture("tied_weights", unusual.TiedWeights, (5,)),
    Architecture("norm_used_twice", unusual.NormUsedTwice),
    Architecture("functional_parameters", unusual.FunctionalParameters),
    Architecture("channel_scale", unusual.ChannelScale),
    Architecture("normalised_input", unusual.NormalisedInput),
    Architecture("convolution_to_tokens", unusual.ConvolutionToTokens),
    Architecture("flatten_in_two_parts", unusual.FlattenInTwoParts),
    Architecture("permuted_channels", unusual.PermutedChannels),
    Architecture("moved_in_place", unusual.MovedInPlace),
    Architecture("weight_standardised", unusual.WeightStandardised),
    Architecture("weight_normed", unusual.WeightNormed, (3, 12)),
    Architecture("recurrent", partial(mixing.Recurrent, nn.LSTM), (4, 5)),
    Architecture("recurrent_gru_rnn", partial(mixing.Recurrent, nn.GRU, nn.RNN), (4, 5)),
    Architecture("attention", mixing.Attention, (4, 5)),
    Architecture("spatial_attention", mixing.SpatialAttention),
    Architecture("modulated", mixing.Modulated),
    Architecture("maxout", mixing.Maxout),
    Architecture("input_added", mixing.InputAdded),
    Architecture("masked", mixing.Masked),
    Architecture("layer_norm", attention.layer_normed, (5,)),
    Architecture("rms_norm", attention.rms_normed, (5,)),
    Architecture("vision_transformer", attention.PatchTransformer),
    Architecture("written_attention", attention.WrittenAttention, (6, 5)),
    Architecture("cosine_attention", attention.CosineAttention, (6, 5)),
    Architecture("channels_last_blocks", attention.ChannelsLastBlocks),
    Architecture("written_norms", attention.WrittenNorms),
]

BY_NAME = {architecture.name: architecture for architecture in ZOO}


@cache
def teachers_of(name: str, count: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, ...]:
    """Teachers of one architecture, which tests share and must leave as they are."""
    architecture = BY_NAME[name]
    return tuple(make_teachers(architecture.make, architecture.inputs(BATCH), count, dtype, seed))


@cache
def _merged(name: str, count: int, dtype: torch.dtype, seed: int) -> BigStudent:
    inputs = BY_NAME[name].inputs(2, dtype=dtype)
    return BigStudent(*teachers_of(name, count, dtype, seed), example_inputs=inputs, verify=False)


def merged(
    name: str, count: int = 2, dtype: torch.dtype = torch.float64, link: bool = False, seed: int = 0
) -> BigStudent:
    """A big student of :func:`teachers_of`, in eval mode, which a test may change.

    It has not checked itself, as the tests do that.
    """
    big = copy.deepcopy(_merged(name, count, dtype, seed))
    if link:
        big.link()
    return big
