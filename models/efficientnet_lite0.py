"""EfficientNet-Lite0 on ImageNet: a convolutional network of 4.7M parameters, made for phones."""

from deployfa.recipe import Data, Recipe

RECIPE = Recipe(
    name="efficientnet_lite0",
    task="image-classification",
    about="EfficientNet-Lite0 (ImageNet, 224 x 224): the 32 convolutions of 1 x 1 that mix its channels",
    sites=r".*(_expand_conv|_project_conv|_conv_head)",
    # with the convolution of the pixels and those that see one channel each, where a low rank has nothing to mix
    sites_all=r".*(_conv_stem|_expand_conv|_depthwise_conv|_project_conv|_conv_head)",
    learning_rate={"vefa": 1e-2, "lorfa": 2e-3, "lora": 2e-3, "full": 5e-5, "head": 5e-3},
    batch_size=16,
    epochs=3.0,
    asset="efficientnet-lite0",
    data=Data("digits", train_rows=1000, test_rows=500),
)
