"""Any ResNet of transformers with a classification head."""

from deployfa.recipe import Recipe

RECIPE = Recipe(
    name="resnet",
    task="image-classification",
    about="any ResNet: the convolutions of its stages",
    sites=r".*encoder\.stages\..*\.layer\.\d+\.convolution",
    sites_all=r".*\.convolution",
    learning_rate={"vefa": 1e-2, "lorfa": 1e-3, "lora": 1e-3, "full": 5e-5, "head": 1e-3},
)
