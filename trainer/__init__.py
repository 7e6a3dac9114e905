"""Training: VSD distillation with LoRaD, and the scripts that made the embedded model."""
