"""From what people have to what a graph is fed: the same code for training, verifying, running and serving."""

from deployfa.preprocess.image import ImagePreprocessor
from deployfa.preprocess.image_steps import ImageSteps
from deployfa.preprocess.preprocessor import Preprocessor, open_preprocessor
from deployfa.preprocess.prompt import PromptPreprocessor
from deployfa.preprocess.settings import Cache, Generation, Preprocessing
from deployfa.preprocess.text import CHAT_TEMPLATE, TOKENIZER_FILES, TextPreprocessor

__all__ = [
    "CHAT_TEMPLATE",
    "TOKENIZER_FILES",
    "Cache",
    "Generation",
    "ImagePreprocessor",
    "ImageSteps",
    "Preprocessing",
    "Preprocessor",
    "PromptPreprocessor",
    "TextPreprocessor",
    "open_preprocessor",
]
