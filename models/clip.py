"""CLIP's picture tower with a classification head."""

from deployfa.recipe import Recipe

RECIPE = Recipe(
    name="clip",
    task="image-classification",
    about="any CLIP: queries and values of its picture tower",
    sites=r".*vision_model\.encoder\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    sites_attention=r".*vision_model\.encoder\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    sites_all=r".*vision_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
)
