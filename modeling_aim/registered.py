"""The public classes, registered with the Auto classes of transformers."""

from .configuration_aim import AimConfig  # isort: skip  first of all: it says which releases are too old

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .backbone_aim import laptop_quantization_config
from .demonstrations_aim import Demonstration, FusedDemonstrations
from .modeling_aim import AimForConditionalGeneration
from .processing_aim import AimProcessor
from .projector_aim import AimProjector

__all__ = [
    "AimConfig",
    "AimForConditionalGeneration",
    "AimProcessor",
    "AimProjector",
    "Demonstration",
    "FusedDemonstrations",
    "laptop_quantization_config",
]

AutoConfig.register(AimConfig.model_type, AimConfig)
AutoModel.register(AimConfig, AimForConditionalGeneration)
AutoModelForImageTextToText.register(AimConfig, AimForConditionalGeneration)
AutoModelForMultimodalLM.register(AimConfig, AimForConditionalGeneration)
AutoProcessor.register(AimConfig, AimProcessor)
