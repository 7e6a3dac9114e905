"""Finetuning runs on a few pictures: a learned word or a personal LoRaD."""
