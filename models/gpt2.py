"""GPT-2, whose layers are ``Conv1D``: the weight is stored as its transpose."""

from deployfa.recipe import Recipe

RECIPE = Recipe(
    name="gpt2",
    task="text-generation",
    about="any GPT-2: the four linear layers of every block",
    sites=r".*\.h\.\d+\.(attn|mlp)\.(c_attn|c_proj|c_fc)",
    learning_rate={"vefa": 5e-3, "lorfa": 1e-3, "lora": 1e-3, "full": 5e-5, "head": 1e-3},
    batch_size=16,
    epochs=1.0,
)
