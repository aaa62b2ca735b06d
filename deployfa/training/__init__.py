"""The only rooms with torch: PEFT tuners, fitting, the base-graph export, and the PyTorch truth."""
