"""Text from a decoder: prompts in, tokens out, with the caches of a graph handed on."""
