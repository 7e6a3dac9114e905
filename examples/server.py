"""A picture for each request: python -m examples.server needs the packages fastapi and uvicorn.

curl "http://127.0.0.1:8000/picture?prompt=a+red+apple&seed=7" -o apple.png
"""

import io
import threading

from wadi_core import OneStepPipeline

pipe = OneStepPipeline.from_pretrained("mini")
one_at_a_time = threading.Lock()


def draw(prompt: str, seed: int = 0) -> bytes:
    """A picture as the bytes of a PNG file."""
    with one_at_a_time:
        picture = pipe(prompt, seed=seed).images[0]
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getvalue()


if __name__ == "__main__":
    import uvicorn
    from fastapi import FastAPI, Response

    app = FastAPI()

    @app.get("/picture")
    def picture(prompt: str, seed: int = 0) -> Response:
        return Response(draw(prompt, seed), media_type="image/png")

    uvicorn.run(app)
