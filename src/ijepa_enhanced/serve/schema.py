"""What the service reads and writes: the dialect of OpenAI and Infinity, with more fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Resolution = Annotated[int, Field(ge=1)] | Literal["native"]
RESOLUTION = Field(
    description="sqrt(height * width) in pixels to resize images to; the aspect ratio is kept. 'native' keeps their "
    "size. Default: the training resolution of the encoder."
)
MERGE_RATE = Field(ge=0, le=0.5, description="Fraction of its tokens that each layer merges.")
DIMENSIONS = Field(ge=1, description="Return only so many of the first numbers of each vector.")
MAPS = Field(description="Also return the features of all patches of each image.")
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4//8/AAX+Av4zEpUUAAAAAElFTkSuQmCC"  # one white pixel
)
FORMAT = Field(description="float: numbers. base64: little-endian float32, in base64.")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageObject(_Strict):
    """An image as Jina writes it."""

    image: str = Field(description="The image file in base64, or as a data URI.")


class EmbeddingRequest(_Strict):
    """Images to embed."""

    model: str | None = Field(None, description="Name of the model, as in /v1/models. Default: the one there is.")
    input: str | ImageObject | Annotated[list[str | ImageObject], Field(min_length=1)] = Field(
        description="An image, or a list of images: 'data:image/jpeg;base64,...' or {\"image\": BASE64}.",
        examples=[[f"data:image/png;base64,{PIXEL}"], {"image": PIXEL}],
    )
    modality: Literal["image"] = "image"
    encoding_format: Annotated[Literal["float", "base64"], FORMAT] = "float"
    dimensions: Annotated[int | None, DIMENSIONS] = None
    user: str | None = Field(None, description="Ignored.")
    resolution: Annotated[Resolution | None, RESOLUTION] = None
    merge_rate: Annotated[float, MERGE_RATE] = 0.0
    maps: Annotated[bool, MAPS] = False


class FeatureMap(BaseModel):
    """The features of the patches of an image."""

    shape: list[int] = Field(description="Rows, columns and width.")
    dtype: Literal["float16"] = "float16"
    data: str = Field(description="Little-endian numbers, row by row, in base64.")


class Embedding(BaseModel):
    """The feature of one image."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    map: FeatureMap | None = None


class Usage(BaseModel):
    """What a request cost."""

    prompt_tokens: int = Field(description="Patches of all images.")
    total_tokens: int = Field(description="The same.")


class EmbeddingResponse(BaseModel):
    """The features of all images of a request, in order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    id: str
    created: int


class Model(BaseModel):
    """The encoder that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ijepa-enhanced"
    dimensions: int
    patch_size: int
    resolution: int | None = Field(description="The training resolution in pixels; null: native size.")
    max_tokens: int = Field(description="Most patches of an image. Larger images are shrunk to it.")
    gallery: int = Field(description="Number of images that the page searches for neighbors.")


class ModelList(BaseModel):
    """All models, which is one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(BaseModel):
    """Whether the service is well."""

    status: str


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """A request that was not met."""

    error: ErrorDetail
