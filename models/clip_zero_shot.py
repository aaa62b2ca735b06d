"""CLIP with a head made of the names of the labels."""

from deployfa.recipe import Recipe

RECIPE = Recipe(
    name="clip_zero_shot",
    task="zero-shot-image-classification",
    about="any CLIP, its head written by its text tower: queries and values of its picture tower",
    sites=r".*vision_model\.encoder\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    sites_attention=r".*vision_model\.encoder\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    sites_all=r".*vision_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
)
