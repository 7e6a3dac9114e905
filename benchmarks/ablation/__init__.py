"""Adapters and ranks compared by distillation runs of equal length."""
