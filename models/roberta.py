"""Any RoBERTa or XLM-RoBERTa encoder with a classification head."""

from deployfa.recipe import Recipe

RECIPE = Recipe(
    name="roberta",
    task="text-classification",
    about="any RoBERTa or XLM-RoBERTa: every linear layer of its encoder, and not of its head",
    sites=r".*encoder\.layer\.\d+\..*(query|key|value|dense)",
    sites_attention=r".*encoder\.layer\.\d+\.attention\.self\.(query|value)",
    learning_rate={"vefa": 5e-3, "lorfa": 1e-3, "lora": 1e-3, "full": 2e-5, "head": 1e-3},
)
