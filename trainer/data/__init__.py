"""Prompts, pictures and random numbers that runs draw from."""
