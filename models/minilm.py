"""all-MiniLM-L6-v2: a BERT of 6 layers and 22.7M parameters, small enough for a laptop."""

from deployfa.recipe import Data, Recipe

RECIPE = Recipe(
    name="minilm",
    task="text-classification",
    about="all-MiniLM-L6-v2 (BERT, 6 layers, d 384): the 36 linear layers of its encoder",
    sites=r".*encoder\.layer\.\d+\..*(query|key|value|dense)",
    sites_attention=r".*encoder\.layer\.\d+\.attention\.self\.(query|value)",
    asset="minilm",
    data=Data("vader", train_rows=3000, test_rows=2000),
)
