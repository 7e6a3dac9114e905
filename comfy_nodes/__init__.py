"""ComfyUI nodes: the core's adapters and its one-step schedule on ComfyUI's models. Imports ComfyUI; knows no diffusers."""
