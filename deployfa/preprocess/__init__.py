"""From what people have to what a graph is fed: the same code for training, verifying, running and serving."""

from deployfa.preprocess.image import ImagePreprocessor
from deployfa.preprocess.image_steps import ImageSteps
from deployfa.preprocess.preprocessor import Preprocessor, open_preprocessor
from deployfa.preprocess.settings import Preprocessing
from deployfa.preprocess.text import TOKENIZER_FILES, TextPreprocessor

__all__ = [
    "TOKENIZER_FILES",
    "ImagePreprocessor",
    "ImageSteps",
    "Preprocessing",
    "Preprocessor",
    "TextPreprocessor",
    "open_preprocessor",
]
