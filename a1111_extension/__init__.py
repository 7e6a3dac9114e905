"""One-step sampling and LoRaD in stable-diffusion-webui (A1111) and in Forge. The root's ``scripts/wadi.py`` starts it."""
