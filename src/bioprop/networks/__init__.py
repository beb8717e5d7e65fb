"""Forward networks as chains of stages, and the feedback mirror of each kind of stage."""

from bioprop.networks.lenet import LeNet
from bioprop.networks.mirrors import LayerMirror, Mirror, build_mirror
from bioprop.networks.mlp import MLP
from bioprop.networks.network import Network, build_network
from bioprop.networks.residual_mirrors import BlockMirror, LayeredMirror, PooledLinearMirror, StemMirror
from bioprop.networks.resnet import (
    BasicBlockStage,
    PooledLinearStage,
    ResNet,
    ResNet18,
    ResNet34,
    StemStage,
)
from bioprop.networks.simple_vgg import SimpleVGG
from bioprop.networks.stages import ConvStage, LayerStage, LinearStage, Stage, StageOutput, StagePass

__all__ = [
    "MLP",
    "BasicBlockStage",
    "BlockMirror",
    "ConvStage",
    "LayerMirror",
    "LayerStage",
    "LayeredMirror",
    "LeNet",
    "LinearStage",
    "Mirror",
    "Network",
    "PooledLinearMirror",
    "PooledLinearStage",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "SimpleVGG",
    "Stage",
    "StageOutput",
    "StagePass",
    "StemMirror",
    "StemStage",
    "build_mirror",
    "build_network",
]
