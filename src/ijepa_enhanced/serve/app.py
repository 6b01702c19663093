"""The HTTP interface of a service."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, File, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from ijepa_enhanced.errors import ImageTooLarge, unknown
from ijepa_enhanced.serve.engine import Answer, BadImage, Engine, How, Overloaded
from ijepa_enhanced.serve.gallery import Gallery
from ijepa_enhanced.serve.guard import Access, Guard
from ijepa_enhanced.serve.images import SHOWN, from_base64_or_data_uri, from_data_uri
from ijepa_enhanced.serve.inspection import encoded, inspect
from ijepa_enhanced.serve.metrics import Metrics
from ijepa_enhanced.serve.refusal import Refusal, busy, error_response
from ijepa_enhanced.serve.schema import (
    DIMENSIONS,
    FORMAT,
    MAPS,
    MERGE_RATE,
    RESOLUTION,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorResponse,
    ImageObject,
    ModelList,
    Resolution,
    Status,
)

MAPPED = 8
"""Most images of a request for maps, which are thousands of times larger than features."""
PAGE = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
"""Media types of the files of the page."""

router = APIRouter(responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}})


@dataclass
class Service:
    """What the routes share."""

    engine: Engine
    metrics: Metrics
    model: str
    """What clients call the encoder."""
    gallery: Gallery | None = None
    draining: bool = False
    """Whether the service is to end, and finishes what it has accepted."""
    created: int = 0
    """When the service was started, in seconds since 1970."""

    @property
    def max_resolution(self) -> int:
        """Return the largest resolution at which a square image fits into a pack."""
        return math.isqrt(self.engine.budget) * self.engine.encoder.config.patch_size

    async def embed(self, images: Sequence[bytes], how: How) -> list[Answer]:
        """Return the answers for images.

        Raises:
            Refusal: there are too many, or one cannot be embedded, or the service is busy.
        """
        limits = self.engine.limits
        most = min(limits.max_images, MAPPED) if how.mapped else limits.max_images
        if len(images) > most:
            kind = " with maps" if how.mapped else ""
            raise Refusal(400, f"A request{kind} may have at most {most} images, not {len(images)}.", "input")
        if isinstance(how.resolution, int) and how.resolution > self.max_resolution:
            raise Refusal(
                400, f"resolution must be at most {self.max_resolution} px, not {how.resolution}.", "resolution"
            )
        try:
            return await self.engine.embed(images, how)
        except Overloaded as error:
            raise busy(error.retry_after) from error
        except BadImage as error:
            status, code = (
                (413, "image_too_large") if isinstance(error.reason, ImageTooLarge) else (400, "invalid_image")
            )
            raise Refusal(status, str(error), f"input[{error.number}]", code) from error


def service_of(request: Request) -> Service:
    """Return the service that a request is for."""
    service: Service = request.app.state.service
    return service


Shared = Annotated[Service, Depends(service_of)]


@router.post("/v1/embeddings", response_model=EmbeddingResponse)
async def embeddings(request: EmbeddingRequest, service: Shared) -> Response:
    """Embed images that are given as data URIs or in base64."""
    if request.model not in (None, service.model):
        raise Refusal(404, unknown("model", (request.model or "")[:SHOWN], [service.model]), "model", "model_not_found")
    items = request.input if isinstance(request.input, list) else [request.input]
    names = [f"input[{number}]" for number in range(len(items))] if isinstance(request.input, list) else ["input"]
    images = [
        from_base64_or_data_uri(item.image, f"{name}.image")
        if isinstance(item, ImageObject)
        else from_data_uri(item, name)
        for item, name in zip(items, names, strict=True)
    ]
    how = How(request.resolution, request.merge_rate, request.maps)
    return await answered(service, images, how, request.encoding_format, request.dimensions)


@router.post("/v1/embeddings/files", response_model=EmbeddingResponse)
async def embedded_files(
    service: Shared,
    files: Annotated[list[UploadFile], File(min_length=1, description="Image files.")],
    encoding_format: Annotated[Literal["float", "base64"], Form(), FORMAT] = "float",
    dimensions: Annotated[int | None, Form(), DIMENSIONS] = None,
    resolution: Annotated[Resolution | None, Form(), RESOLUTION] = None,
    merge_rate: Annotated[float, Form(), MERGE_RATE] = 0.0,
    maps: Annotated[bool, Form(), MAPS] = False,
) -> Response:
    """Embed images that are uploaded as files."""
    how = How(resolution, merge_rate, maps)
    return await answered(service, [await file.read() for file in files], how, encoding_format, dimensions)


async def answered(
    service: Service, images: Sequence[bytes], how: How, encoding_format: str, dimensions: int | None
) -> Response:
    """Return the features of images as OpenAI's interface does; errors as for `Service.embed`."""
    width = service.engine.encoder.width
    if dimensions is not None and dimensions > width:
        raise Refusal(400, f"dimensions must be at most {width}, not {dimensions}.", "dimensions")
    answers = await service.embed(images, how)
    data: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        output = answer.made.output
        vector = output.vector[:dimensions]
        value = encoded(vector.astype("<f4")) if encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": number, "embedding": value})
        if output.maps is not None:
            features = output.maps.features
            data[-1]["map"] = {
                "shape": features.shape,
                "dtype": "float16",
                "data": encoded(features.astype("<f2")),
            }
    tokens = sum(answer.made.output.tokens[0] for answer in answers)
    content = {
        "object": "list",
        "data": data,
        "model": service.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "id": f"embd-{uuid.uuid4().hex}",
        "created": int(time.time()),
    }
    return JSONResponse(content)


@router.post("/v1/inspect", include_in_schema=False)
async def inspected(
    service: Shared,
    files: Annotated[list[UploadFile], File(min_length=1)],
    resolution: Annotated[Resolution | None, Form(), RESOLUTION] = None,
    merge_rate: Annotated[float, Form(), MERGE_RATE] = 0.0,
) -> Response:
    """Return what the page draws."""
    answers = await service.embed([await file.read() for file in files], How(resolution, merge_rate, True))
    patch_size = service.engine.encoder.config.patch_size
    return JSONResponse(await run_in_threadpool(inspect, answers, patch_size, service.gallery))


@router.get("/v1/models", response_model=ModelList)
async def models(service: Shared) -> Response:
    """List the encoder that is served."""
    encoder = service.engine.encoder
    model = {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "ijepa-enhanced",
        "dimensions": encoder.width,
        "patch_size": encoder.config.patch_size,
        "resolution": encoder.preprocessing.resolution,
        "max_tokens": service.engine.budget,
        "gallery": service.gallery.folder.images if service.gallery else 0,
    }
    return JSONResponse({"object": "list", "data": [model]})


@router.get("/v1/gallery/{row}", include_in_schema=False)
async def thumbnail(row: int, service: Shared) -> Response:
    """Return an image of the gallery, small."""
    image = await run_in_threadpool(service.gallery.thumbnail, row) if service.gallery else None
    if image is None:
        raise Refusal(404, f"The gallery has no image {row}, or it cannot be read any more.")
    return Response(image, media_type="image/jpeg")


@router.get("/healthz", response_model=Status)
async def health(service: Shared) -> Response:
    """Tell whether the process works. Restart it if not."""
    return JSONResponse({"status": "ok"}) if service.engine.alive else error_response(503, "The encoder has stopped.")


@router.get("/readyz", response_model=Status)
async def readiness(service: Shared) -> Response:
    """Tell whether to send requests here."""
    if service.draining or not service.engine.alive:
        return error_response(503, "The service is shutting down.")
    return JSONResponse({"status": "ok"})


@router.get("/metrics", response_class=Response)
async def metrics(service: Shared) -> Response:
    """Return the values that Prometheus collects."""
    service.metrics.pending.set(service.engine.pending)
    return Response(service.metrics.text(), media_type=service.metrics.content_type)


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """Return the page."""
    return page_file("index.html")


@router.get("/docs", include_in_schema=False)
async def documentation() -> Response:
    """Return a page that shows the OpenAPI schema."""
    return page_file("docs.html")


@router.get("/page/{name}", include_in_schema=False)
async def part_of_page(name: str) -> Response:
    """Return what a page loads."""
    return page_file(name)


def page_file(name: str) -> Response:
    """Return a file of the page.

    Raises:
        Refusal: there is no such file.
    """
    folder = files("ijepa_enhanced.serve") / "page"
    found = {each.name: each for each in folder.iterdir()}  # the name is looked up, never used as a path
    if name not in found:
        raise Refusal(404, f"The page has no file '{name}'.")
    return Response(found[name].read_bytes(), media_type=PAGE[name.rpartition(".")[2]])


async def wrong_request(request: Request, error: Exception) -> Response:
    """Answer a request that does not fit the schema."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "path")]
    if first["type"] == "json_invalid":
        return error_response(400, f"The body is not valid JSON: {first['ctx']['error']}.")
    if not place:
        return error_response(400, "The body must be a JSON object, sent as Content-Type: application/json.")
    name = place[0][:SHOWN]
    if name == "input":
        message = "must be an image as a data URI or {'image': BASE64}, or a list of these"
    elif first["type"] == "missing":
        message = "is missing"
    elif first["type"] == "extra_forbidden":
        message = "is not a field of this request"
    else:
        message = f"is wrong: {first['msg'].replace('Input', 'it', 1)}, not {first['input']!r:.60}"
    return error_response(400, f"{name} {message}.", name)


async def refused(request: Request, error: Exception) -> Response:
    """Answer a request that is refused, by us or by the framework."""
    assert isinstance(error, HTTPException)
    if isinstance(error, Refusal):
        return error.response()
    return error_response(error.status_code, f"{error.detail.rstrip('.')}.", headers=error.headers)


async def failed(request: Request, error: Exception) -> Response:
    """Answer a request that met a bug; the server logs its traceback."""
    return error_response(500, "The service failed. Its log says why.")


def make_app(service: Service, access: Access) -> ASGIApp:
    """Return the application with all that guards it."""
    app = FastAPI(
        title="IJEPA-Enhanced",
        version="1",  # of the interface, as in its paths
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            RequestValidationError: wrong_request,
            HTTPException: refused,
            Exception: failed,
        },
    )
    app.state.service = service
    app.include_router(router)
    guarded: ASGIApp = Guard(app, service.engine.limits, access, service.metrics)
    if access.origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    return guarded
