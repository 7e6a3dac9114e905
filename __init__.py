"""ComfyUI reads this file of the pack and no other; everything else is imported when ComfyUI asks for the nodes."""

WEB_DIRECTORY = "./comfy_nodes/web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    """The pack as ComfyUI's ComfyExtension; ComfyUI calls this once, at its start."""
    from .comfy_nodes.extension import WadiExtension

    return WadiExtension()
