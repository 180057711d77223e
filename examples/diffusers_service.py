"""An image-to-image service that knows when it is sent what its model never learned.

FastAPI, a pipeline per request on one shared denoiser (as diffusers' own server does it), the
user's image scored in the thread that serves it, and metrics for Prometheus. The script serves
itself: eight threads send digits, then photographs, and it prints what Prometheus would see. The
model is tiny and its weights are random, so that nothing is downloaded: what this shows is the
service, not how well a model detects.

    pip install fastapi uvicorn prometheus-client
    python examples/diffusers_service.py
"""

import io
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import diffusers
import numpy as np
import PIL.Image
import torch
import uvicorn
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from ood_monitor_integrations.diffusers import fit_pipeline, wrap
from ood_monitor_integrations.prometheus import PrometheusSink, score_buckets
from prometheus_client import Histogram, generate_latest
from sklearn.datasets import load_digits, load_sample_images

import ood_monitor as om

PORT, THREADS, SIZE = 8765, 8, 16
Image = PIL.Image.Image


def service(
    shared: StableDiffusionImg2ImgPipeline, monitor: om.Monitor, meters: PrometheusSink
) -> FastAPI:
    app = FastAPI()
    seconds = Histogram("request_seconds", "Of a request.", registry=meters.registry)

    def changed(image: Image) -> tuple[Image, float]:
        """In a thread of its own, with a scheduler of its own."""
        scheduler = DDIMScheduler.from_config(shared.scheduler.config)
        pipe = StableDiffusionImg2ImgPipeline.from_pipe(shared, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        with wrap(pipe, monitor, what="inputs") as watched:
            output = watched(image=image, **ARGUMENTS)
            meters.dropped(watched.counts.failures)
        scores = getattr(output, "ood", None)
        return output.images[0], float(scores.p_value[0]) if scores else float("nan")

    @app.post("/img2img")
    async def img2img(request: Request) -> Response:
        start, body = time.perf_counter(), await request.body()
        image = PIL.Image.open(io.BytesIO(body)).convert("RGB")
        made, p_value = await run_in_threadpool(changed, image)
        seconds.observe(time.perf_counter() - start)
        return Response(png(made), media_type="image/png", headers={"X-OOD-P-Value": str(p_value)})

    @app.get("/metrics")
    def read() -> Response:
        return Response(generate_latest(meters.registry), media_type="text/plain")

    return app


#: No text: a prompt's embedding is what a text encoder would give for it.
ARGUMENTS = {
    "prompt_embeds": torch.ones(1, 7, 8),
    "guidance_scale": 1.0,
    "strength": 0.6,
    "num_inference_steps": 5,
}


def pipeline() -> StableDiffusionImg2ImgPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return StableDiffusionImg2ImgPipeline(
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def digits() -> list[Image]:
    pictures = (PIL.Image.fromarray((d * 15.9).astype(np.uint8)) for d in load_digits().images)
    return [picture.resize((SIZE, SIZE)).convert("RGB") for picture in pictures]


def photographs(count: int) -> list[Image]:
    """Pieces of scikit-learn's two photographs."""
    generator, photos = np.random.default_rng(0), load_sample_images().images
    corners = generator.integers(0, 400, (count, 2))
    pieces = [photos[i % 2][y : y + 24, x : x + 24] for i, (y, x) in enumerate(corners)]
    return [PIL.Image.fromarray(piece).resize((SIZE, SIZE)) for piece in pieces]


def png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@contextmanager
def serving(app: FastAPI) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield
    finally:
        server.should_exit = True
        thread.join()


def post(image: Image) -> float:
    """The p-value that the service gives an image, beside the image that it makes of it."""
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/img2img", png(image))
    with urllib.request.urlopen(request, timeout=60) as answer:
        PIL.Image.open(io.BytesIO(answer.read())).verify()
        return float(answer.headers["X-OOD-P-Value"])


def metrics() -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def main() -> int:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()  # of `from_pipe`, which says nothing new
    shared, images = pipeline(), digits()
    order = np.random.default_rng(0).permutation(len(images))
    held_out = [images[i] for i in order[:240]]
    traffic = [images[i] for i in order[240:280]]
    batches = [held_out[i : i + 40] for i in range(0, 240, 40)]
    detector = fit_pipeline(shared, batches, call=ARGUMENTS | {"image": held_out[:1]})
    meters = PrometheusSink(model="img2img", detector="v1", buckets=score_buckets(detector))
    sinks = [om.LoggingSink(), meters]
    monitor = om.Monitor(detector, ert=1_000, fpr=0.01, sinks=sinks, name="inputs")
    with serving(service(shared, monitor, meters)), ThreadPoolExecutor(THREADS) as load, monitor:
        for name, sent in (("digits", traffic), ("photographs", photographs(20))):
            p_values = list(load.map(post, sent))
            print(f"{len(sent)} {name}: median p-value {np.median(p_values):.3f}")
        monitor.flush()  # the meters have all that was scored
        seen = metrics()
    names = ("samples", "status", "alerts", "scoring")
    meters_of = ("request", *(f"ood_monitor_{name}" for name in names))
    lines = [line for line in seen.splitlines() if line.startswith(meters_of)]
    print("\n".join(line for line in lines if "_bucket" not in line and "_created" not in line))
    scored = sum(float(line.split()[-1]) for line in lines if "_samples_total" in line)
    return 0 if scored == 60 and "request_seconds_count 60.0" in lines else 1


if __name__ == "__main__":
    sys.exit(main())
