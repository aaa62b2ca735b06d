"""Any vision transformer of transformers' ViT kind with a classification head."""

from deployfa.recipe import Recipe

RECIPE = Recipe(
    name="vit",
    task="image-classification",
    about="any ViT: queries and values of its attention",
    sites=r".*\.attention\.(.*\.)?(q_proj|v_proj|query|value)",
    sites_attention=r".*\.attention\.(.*\.)?(q_proj|v_proj|query|value)",
    sites_all=r".*\.(attention|intermediate|output|mlp)\.(.*\.)?(q_proj|k_proj|v_proj|o_proj|fc1|fc2|query|key|value|dense)",
)
