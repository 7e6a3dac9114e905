"""Distillation of a multi-step model into a one-step LoRaD (variational score distillation)."""
