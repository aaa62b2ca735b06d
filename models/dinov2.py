"""DINOv2 with a classification head."""

from deployfa.recipe import Recipe

RECIPE = Recipe(
    name="dinov2",
    task="image-classification",
    about="any DINOv2: queries and values of its attention",
    sites=r".*\.attention\.(.*\.)?(q_proj|v_proj|query|value)",
    sites_attention=r".*\.attention\.(.*\.)?(q_proj|v_proj|query|value)",
    sites_all=r".*\.encoder\.layer\.\d+\.(.*\.)?(q_proj|k_proj|v_proj|o_proj|fc1|fc2|query|key|value|dense|weights_in|weights_out)",
)
