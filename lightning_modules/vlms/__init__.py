"""Model families. Importing this package registers TinyVLM with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoVideoProcessor,
)

from vidreason.lightning_modules.vlms.tiny.configuration import TinyVLMConfig
from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration, TinyVLMModel
from vidreason.lightning_modules.vlms.tiny.processing import TinyVLMProcessor, TinyVLMVideoProcessor

AutoConfig.register(TinyVLMConfig.model_type, TinyVLMConfig, exist_ok=True)
AutoModel.register(TinyVLMConfig, TinyVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(TinyVLMConfig, TinyVLMForConditionalGeneration, exist_ok=True)
AutoVideoProcessor.register(TinyVLMConfig, TinyVLMVideoProcessor, exist_ok=True)
AutoProcessor.register(TinyVLMConfig, TinyVLMProcessor, exist_ok=True)
