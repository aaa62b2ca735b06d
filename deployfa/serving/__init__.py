"""Answer over HTTP: the Open Inference Protocol v2, with requests for different adapters in one batch."""
