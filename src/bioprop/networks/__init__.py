"""Forward networks as chains of stages, and the feedback mirror of each kind of stage."""

from bioprop.networks.invertible_mlp import InvertibleMLP, InvertibleStage
from bioprop.networks.lenet import LeNet
from bioprop.networks.mirrors import LayerMirror, Mirror, build_mirror
from bioprop.networks.mlp import MLP
from bioprop.networks.network import AnyModule, Network, build_network
from bioprop.networks.outer_mirrors import OuterMirror, build_outer_mirror
from bioprop.networks.residual_mirrors import BlockMirror, PooledLinearMirror, StemMirror
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
from bioprop.networks.standardized import StandardizedStage

__all__ = [
    "MLP",
    "AnyModule",
    "BasicBlockStage",
    "BlockMirror",
    "ConvStage",
    "InvertibleMLP",
    "InvertibleStage",
    "LayerMirror",
    "LayerStage",
    "LeNet",
    "LinearStage",
    "Mirror",
    "Network",
    "OuterMirror",
    "PooledLinearMirror",
    "PooledLinearStage",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "SimpleVGG",
    "Stage",
    "StageOutput",
    "StagePass",
    "StandardizedStage",
    "StemMirror",
    "StemStage",
    "build_mirror",
    "build_network",
    "build_outer_mirror",
]
