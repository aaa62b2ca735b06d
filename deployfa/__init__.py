"""deployfa: train, fold, verify, time and run feature-space adapters (VeFA, LoRFA)."""
