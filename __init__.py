"""ComfyUI reads this file of the pack and no other; everything else is imported when ComfyUI asks for the nodes."""

WEB_DIRECTORY = "./comfy_nodes/web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():  # noqa: ANN201 - the type lives in ComfyUI, which is not there for others who import this
    from .comfy_nodes.extension import WadiExtension

    return WadiExtension()
