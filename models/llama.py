"""Llama and its kin; SmolLM2-135M-Instruct comes with it, small enough for a laptop."""

from deployfa.recipe import Data, Recipe

RECIPE = Recipe(
    name="llama",
    task="text-generation",
    about="Llama and its kin (30 layers in SmolLM2-135M): the seven linear layers of every block",
    sites=r".*\.layers\.\d+\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    sites_attention=r".*\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    learning_rate={"vefa": 5e-3, "lorfa": 1e-3, "lora": 1e-3, "full": 2e-5, "head": 1e-3},
    batch_size=16,
    epochs=1.0,
    asset="smollm2",
    data=Data("vader", train_rows=1200, test_rows=300),
)
