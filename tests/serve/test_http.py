"""The HTTP interface: the dialect of OpenAI, what is refused and how, and who may ask."""

import asyncio
import base64
import dataclasses
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.types import ASGIApp, Message

from ijepa_enhanced.encoder import Encoder
from ijepa_enhanced.serve.app import Service, make_app
from ijepa_enhanced.serve.config import Limits
from ijepa_enhanced.serve.engine import Engine
from ijepa_enhanced.serve.guard import Access
from ijepa_enhanced.serve.metrics import Metrics

MakeImage = Callable[..., bytes]

LIMITS = Limits(
    max_bytes=200_000, max_pixels=50_000, max_images=6, timeout=20, queue=12, tokens_per_pack=400, max_wait=1
)
BASE = "http://localhost:8000"


class Client:
    """Sends requests to an application in this process.

    Args:
        app: from `make_app`.
    """

    def __init__(self, app: ASGIApp, **how: Any) -> None:
        self.app = app
        self.how = {"base_url": BASE} | how

    def __call__(self, method: str, path: str, **what: Any) -> httpx.Response:
        """One request."""
        (answer,) = self.together((method, path, what))
        return answer

    def together(self, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
        """Several requests at once."""

        async def send() -> list[httpx.Response]:
            # What a client would get, not the exception that made it.
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, **self.how) as client:
                return await asyncio.gather(*(client.request(method, path, **what) for method, path, what in requests))

        return asyncio.run(send())

    def embed(self, *inputs: Any, **fields: Any) -> httpx.Response:
        """Embed images in JSON."""
        return self("POST", "/v1/embeddings", json={"input": list(inputs)} | fields)

    def upload(self, *files: bytes, **fields: Any) -> httpx.Response:
        """Embed images as files."""
        parts = [("files", (f"{number}.bin", file)) for number, file in enumerate(files)]
        return self("POST", "/v1/embeddings/files", files=parts, data=fields)


@pytest.fixture(scope="module")
def service(encoder: Encoder) -> Iterator[Service]:
    metrics = Metrics()
    engine = Engine(encoder, LIMITS, metrics.count_pack)
    yield Service(engine, metrics, "pets")
    engine.close()


@pytest.fixture(scope="module")
def client(service: Service) -> Client:
    return Client(make_app(service, Access()))


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in an answer."""
    assert answer.status_code >= 400
    content = answer.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"message", "type", "param", "code"}
    assert content["error"]["message"].endswith((".", "?"))
    error: dict[str, Any] = content["error"]
    return error


def close_to(found: Any, expected: Any) -> bool:
    """As in test_engine.py."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return bool(np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-6)


def test_an_answer_is_what_openai_specifies(client: Client, encoder: Encoder, make_image: MakeImage) -> None:
    images = [make_image(30 + 5 * number, 60 - 4 * number, number) for number in range(3)]
    inputs = [uri(images[0]), {"image": base64.b64encode(images[1]).decode()}, {"image": uri(images[2])}]
    answer = client.embed(*inputs, model="pets", modality="image", user="me")
    assert answer.status_code == 200
    content = answer.json()
    assert content.keys() == {"object", "data", "model", "usage", "id", "created"}
    assert (content["object"], content["model"]) == ("list", "pets")
    assert [{**each, "embedding": None} for each in content["data"]] == [
        {"object": "embedding", "index": number, "embedding": None} for number in range(3)
    ]
    expected = encoder.embed(images)
    for each, vector in zip(content["data"], expected, strict=True):
        assert close_to(each["embedding"], vector)
    patches = sum(packed.segments.total for packed in encoder.packs(images))
    assert content["usage"] == {"prompt_tokens": patches, "total_tokens": patches}


def test_one_input_needs_no_list(client: Client, encoder: Encoder, make_image: MakeImage) -> None:
    answer = client("POST", "/v1/embeddings", json={"input": uri(make_image())})
    assert close_to(answer.json()["data"][0]["embedding"], encoder.embed([make_image()])[0])


def test_base64_holds_the_same_numbers_and_dimensions_cut_them(client: Client, make_image: MakeImage) -> None:
    image = uri(make_image())
    whole = client.embed(image).json()["data"][0]["embedding"]
    coded = client.embed(image, encoding_format="base64", dimensions=10).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == whole[:10]


def test_resolution_and_merge_rate_are_those_of_the_encoder(
    client: Client, encoder: Encoder, make_image: MakeImage
) -> None:
    image = make_image(90, 60)
    for how in ({"resolution": 64, "merge_rate": 0.15}, {"resolution": "native"}):
        content = client.embed(uri(image), **how).json()
        assert close_to(content["data"][0]["embedding"], encoder.embed([image], **how)[0])
        uploaded = client.upload(image, **how).json()
        assert uploaded["data"] == content["data"]


def test_maps_are_the_features_of_the_patches(client: Client, encoder: Encoder, make_image: MakeImage) -> None:
    image = make_image(90, 60)
    found = client.embed(uri(image), maps=True).json()["data"][0]["map"]
    (expected,) = encoder.feature_maps([image])
    assert found["shape"] == list(expected.shape)
    features = np.frombuffer(base64.b64decode(found["data"]), "<f2").reshape(found["shape"])
    # Half of a unit in the last of 11 bits.
    assert np.abs(features - expected.numpy()).max() <= 2**-11 * expected.abs().max().item() + 1e-5


def test_requests_that_come_together_share_packs(client: Client, service: Service, make_image: MakeImage) -> None:
    before = service.metrics.registry.get_sample_value("ijepa_pack_images_count") or 0
    body = {"json": {"input": [uri(make_image(16, 16, number)) for number in range(2)]}}
    answers = client.together(*[("POST", "/v1/embeddings", body)] * 6)
    assert [answer.status_code for answer in answers] == [200] * 6
    packs = (service.metrics.registry.get_sample_value("ijepa_pack_images_count") or 0) - before
    assert packs < 12


def test_the_openai_client_works(service: Service, encoder: Encoder, make_image: MakeImage) -> None:
    from openai import AsyncOpenAI, NotFoundError

    async def talk() -> tuple[Any, Any]:
        transport = httpx.ASGITransport(make_app(service, Access(token="secret")))
        http = httpx.AsyncClient(transport=transport)
        async with AsyncOpenAI(base_url=f"{BASE}/v1", api_key="secret", http_client=http) as openai:
            listed = await openai.models.list()
            name = listed.data[0].id
            found = await openai.embeddings.create(model=name, input=[uri(make_image())])
            more = {"resolution": 64, "merge_rate": 0.1}
            other = await openai.embeddings.create(
                model=name, input=uri(make_image()), dimensions=5, encoding_format="float", extra_body=more
            )
            with pytest.raises(NotFoundError, match="Unknown model 'cats'"):
                await openai.embeddings.create(model="cats", input=uri(make_image()))
            return found, other

    found, other = asyncio.run(talk())
    assert close_to(found.data[0].embedding, encoder.embed([make_image()])[0])  # sent in base64, the client's default
    (expected,) = encoder.embed([make_image()], resolution=64, merge_rate=0.1)
    assert close_to(other.data[0].embedding, expected[:5])
    assert found.usage.total_tokens == 35


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(height: int, width: int, pixels: int | None = None) -> bytes:
    """A PNG file that is small and decompresses to gray pixels of this size, or fewer."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = zlib.compress(bytes((width + 1) * height if pixels is None else pixels), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zipped(data: bytes) -> bytes:
    """A file that is an image at its start and a ZIP archive at its end."""
    archive = io.BytesIO(data)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("run.py", "import os")
    return archive.getvalue()


PNG, JPEG = "a PNG file", "a JPEG file"
KINDS = "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file."
HOSTILE = {
    "nothing": (b"", 400, "Image 0: empty file."),
    "text": (b"cat", 400, f"Image 0: {KINDS}"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', 400, f"Image 0: {KINDS}"),
    "HTML": (b"<!DOCTYPE html><img src=x onerror=alert(1)>", 400, f"Image 0: {KINDS}"),
    "PDF": (b"%PDF-1.7\n%\xff\xd8\xff", 400, f"Image 0: {KINDS}"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400, f"Image 0: {KINDS}"),
    "pickle": (b"\x80\x04\x95\x1a\x00\x00\x00cos\nsystem\n", 400, f"Image 0: {KINDS}"),
    "header alone": (b"\x89PNG\r\n\x1a\n", 400, "Image 0: damaged header: "),
    "bomb": (bomb(5000, 5000), 413, "Image 0: 5000 x 5000 px is above the limit of 50,000 px."),
    "largest bomb": (
        bomb(2**31 - 1, 2**31 - 1, pixels=1),
        413,
        "Image 0: 2147483647 x 2147483647 px is above the limit of 50,000 px.",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_image_or_too_large_is_refused(client: Client, name: str) -> None:
    data, status, message = HOSTILE[name]
    for answer in (client.embed(uri(data)), client.upload(data)):
        assert answer.status_code == status
        assert error_of(answer)["message"].startswith(message)
        assert error_of(answer)["param"] == "input[0]"


def test_a_damaged_image_is_refused(client: Client, make_image: MakeImage) -> None:
    image = make_image(kind="JPEG")
    answer = client.upload(make_image(), image[: len(image) // 2])
    assert answer.status_code == 400
    assert error_of(answer)["message"].startswith("Image 1: cannot be decoded: ")


def test_a_polyglot_is_only_its_pixels(client: Client, make_image: MakeImage) -> None:
    image = make_image()
    found = client.embed(uri(zipped(image), kind="jpeg")).json()["data"]
    assert found == client.embed(uri(image)).json()["data"]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(client: Client, make_image: MakeImage, kind: str) -> None:
    first, second = (Image.open(io.BytesIO(make_image(seed=seed))) for seed in (0, 1))
    moving, still = io.BytesIO(), io.BytesIO()
    how = {"lossless": True} if kind == "WEBP" else {}
    first.save(moving, kind, save_all=True, append_images=[second] * 3, **how)
    first.save(still, kind, **how)
    assert moving.getvalue() != still.getvalue()
    assert client.upload(moving.getvalue()).json()["data"] == client.upload(still.getvalue()).json()["data"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "https://example.org/cat.jpg",
            "input[0] is a URL, 'https://example.org/cat.jpg', which the service does not fetch. Send the image "
            "itself, as a data URI.",
        ),
        (
            "file:///etc/passwd",
            "input[0] is a URL, 'file:///etc/passwd', which the service does not fetch. Send the image itself, as a "
            "data URI.",
        ),
        (
            "/etc/passwd",
            "input[0] must be an image as a data URI ('data:image/jpeg;base64,...'), not '/etc/passwd'.",
        ),
        (
            {"image": "https://example.org/cat.jpg"},
            "input[0].image is a URL, 'https://example.org/cat.jpg', which the service does not fetch. Send the image "
            "itself, as a data URI.",
        ),
        ("", "input[0] must be an image as a data URI ('data:image/jpeg;base64,...'), not ''."),
        (
            "data:image/png,abc",
            "input[0] must start with 'data:image/TYPE;base64,', not 'data:image/png,abc'.",
        ),
        (
            "data:text/html;base64,PGI+",
            "input[0] must start with 'data:image/TYPE;base64,', not 'data:text/html;base64,PGI+'.",
        ),
        ("data:image/png;base64,a*b", "input[0] is not valid base64: Only base64 data is allowed."),
        ("data:image/png;base64,\u00e9", "input[0] is not valid base64: "),
        ({"image": "abc"}, "input[0].image is not valid base64: Incorrect padding."),
        (
            {"text": "a cat"},
            "input must be an image as a data URI or {'image': BASE64}, or a list of these.",
        ),
        (7, "input must be an image as a data URI or {'image': BASE64}, or a list of these."),
    ],
)
def test_what_does_not_hold_an_image_is_named(client: Client, value: Any, message: str) -> None:
    answer = client.embed(value)
    assert answer.status_code == 400
    assert error_of(answer)["message"].startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "pet"}, "Unknown model 'pet'. Did you mean 'pets'?"),
        ({"merge_rate": 0.6}, "merge_rate is wrong: it should be less than or equal to 0.5, not 0.6."),
        ({"merge_rate": -1.0}, "merge_rate is wrong: it should be greater than or equal to 0, not -1.0."),
        ({"merge_rate": "0.1"}, "merge_rate is wrong: it should be a valid number, not '0.1'."),
        ({"resolution": 0}, "resolution is wrong: it should be greater than or equal to 1, not 0."),
        ({"resolution": 161}, "resolution must be at most 160 px, not 161."),  # 8 px times the root of 400 patches
        ({"resolution": "large"}, "resolution is wrong: "),
        ({"dimensions": 0}, "dimensions is wrong: it should be greater than or equal to 1, not 0."),
        ({"dimensions": 193}, "dimensions must be at most 192, not 193."),
        ({"encoding_format": "hex"}, "encoding_format is wrong: it should be 'float' or 'base64', not 'hex'."),
        ({"modality": "text"}, "modality is wrong: it should be 'image', not 'text'."),
        ({"merge": 0.1}, "merge is not a field of this request."),
        ({"input": []}, "input must be an image as a data URI or {'image': BASE64}, or a list of these."),
        ({"maps": 1}, "maps is wrong: it should be a valid boolean, not 1."),
    ],
)
def test_a_wrong_field_is_named(client: Client, make_image: MakeImage, fields: dict[str, Any], message: str) -> None:
    answer = client.embed(uri(make_image()), **fields)
    assert answer.status_code == (404 if "model" in fields else 400)
    assert error_of(answer)["message"].startswith(message)


def test_too_many_images_are_refused(client: Client, make_image: MakeImage) -> None:
    answer = client.upload(*[make_image(8, 8)] * 7)
    assert answer.status_code == 400
    assert error_of(answer)["message"] == "A request may have at most 6 images, not 7."


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"{", "application/json", "The body is not valid JSON: "),
        (b"[1]", "application/json", "The body must be a JSON object, sent as Content-Type: application/json."),
        (b'{"input": "x"}', "text/plain", "The body must be a JSON object, sent as Content-Type: application/json."),
        (b"", "application/json", "The body must be a JSON object, sent as Content-Type: application/json."),
        (b"{}", "application/json", "input must be an image as a data URI"),
        (b"\xff" * 9, "application/json", "There was an error parsing the body."),
        (b"[" * 100_000, "application/json", "There was an error parsing the body."),
    ],
)
def test_a_body_that_is_no_request_is_named(client: Client, body: bytes, kind: str, message: str) -> None:
    answer = client("POST", "/v1/embeddings", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert error_of(answer)["message"].startswith(message)


def test_multipart_that_is_none_is_refused(client: Client) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (b"--x", b"--x\r\nno header\r\n", b"", b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\na'):
        answer = client("POST", "/v1/embeddings/files", content=body, headers=kind)
        assert answer.status_code == 400
        error_of(answer)


def test_a_large_body_is_refused_with_and_without_its_length(client: Client) -> None:
    body = b"x" * 300_000

    async def pieces() -> Any:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for content in (body, pieces()):
        answer = client("POST", "/v1/embeddings", content=content)
        assert answer.status_code == 413
        assert error_of(answer)["message"] == "The body has more than 200,000 bytes."


def test_a_crowd_is_told_when_to_come_back(client: Client, service: Service, make_image: MakeImage) -> None:
    body = {"json": {"input": [uri(make_image(8, 8, number)) for number in range(6)]}}
    answers = client.together(*[("POST", "/v1/embeddings", body)] * 5)
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) >= 2  # 12 have room
    assert statuses.count(429) == 5 - statuses.count(200) > 0
    for answer in answers:
        if answer.status_code == 429:
            seconds = answer.headers["Retry-After"]
            assert error_of(answer)["message"] == f"The service is busy. Try again in {seconds} s."
            assert error_of(answer)["type"] == "rate_limit_error"
    assert service.engine.pending == 0


def test_only_those_with_the_token_may_ask(service: Service, make_image: MakeImage) -> None:
    client = Client(make_app(service, Access(token="secret")))
    requests = [("GET", "/v1/models"), ("POST", "/v1/embeddings"), ("POST", "/v1/inspect"), ("GET", "/metrics")]
    for method, path in [*requests, ("GET", "/v1/gallery/0"), ("GET", "/anything"), ("POST", "/v1/embeddings/files")]:
        for given, said in (("", "is missing"), ("Bearer wrong", "is wrong"), ("Basic secret", "is wrong")):
            answer = client(method, path, headers={"Authorization": given} if given else {})
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert (
                error_of(answer)["message"] == f"The token {said}. Send it in the header 'Authorization: Bearer TOKEN'."
            )
        answer = client(method, path, headers={"Authorization": "Bearer secret"})
        assert answer.status_code != 401
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/page/app.js"):
        assert client("GET", path).status_code == 200


def test_pages_of_other_sites_may_not_use_a_local_service(service: Service) -> None:
    client = Client(make_app(service, Access(hosts=frozenset({"localhost", "127.0.0.1", "::1"}))))
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        answer = client("GET", "/v1/models", headers={"Host": host})
        assert answer.status_code == 403
        assert "does not answer to the host name" in error_of(answer)["message"]
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client("GET", "/v1/models", headers={"Host": host}).status_code == 200
    for origin, status in (("http://evil.example", 403), ("null", 403), (BASE, 200)):
        assert client("GET", "/v1/models", headers={"Origin": origin}).status_code == status


def test_cors_is_only_for_those_named(service: Service) -> None:
    plain = Client(make_app(service, Access()))
    open_to = Client(make_app(service, Access(origins=("https://app.example",))))
    ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert "Access-Control-Allow-Origin" not in plain("OPTIONS", "/v1/embeddings", headers=ask).headers
    assert open_to("OPTIONS", "/v1/embeddings", headers=ask).status_code == 200
    answer = open_to("GET", "/v1/models", headers={"Origin": "https://app.example"})
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert open_to("GET", "/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_what_is_not_there_is_named(client: Client) -> None:
    for method, path, status in (
        ("GET", "/v2", 404),
        ("GET", "/v1/embeddings", 405),
        ("GET", "/page/none.js", 404),
        ("GET", "/page/..%2Fapp.py", 404),
        ("GET", "/v1/gallery/0", 404),
        ("GET", "/v1/gallery/x", 400),
    ):
        answer = client(method, path)
        assert answer.status_code == status
        error_of(answer)


def test_health_readiness_and_metrics(client: Client, service: Service, make_image: MakeImage) -> None:
    assert client("GET", "/healthz").json() == client("GET", "/readyz").json() == {"status": "ok"}
    draining = dataclasses.replace(service, draining=True)
    answer = Client(make_app(draining, Access()))("GET", "/readyz")
    assert answer.status_code == 503
    assert error_of(answer)["type"] == "server_error"
    client.embed(uri(make_image()))
    client("GET", "/anything/at/all")
    text = client("GET", "/metrics").text
    for line in ('ijepa_requests_total{path="/v1/embeddings",status="200"}', "ijepa_pending_images 0.0"):
        assert line in text
    assert 'path="other",status="404"' in text
    assert "anything" not in text


def test_a_model_is_described(client: Client) -> None:
    (model,) = client("GET", "/v1/models").json()["data"]
    assert (model["id"], model["dimensions"], model["patch_size"], model["resolution"]) == ("pets", 192, 8, 48)
    assert model["max_tokens"] == 400


def test_a_bug_is_an_answer_without_its_details(
    client: Client, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("secret path")

    monkeypatch.setattr("ijepa_enhanced.serve.packer.run_pack", failing)
    answer = client.embed(uri(make_image()))
    assert answer.status_code == 500
    assert error_of(answer)["message"] == "The service failed. Its log says why."


def test_answers_forbid_what_browsers_could_do_with_them(client: Client) -> None:
    for path in ("/", "/v1/models", "/nothing"):
        headers = client("GET", path).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'none';")
        assert headers["X-Content-Type-Options"] == "nosniff"


async def exchange(app: ASGIApp, body: bytes, messages: list[Message], wait: float = 0.0) -> list[Message]:
    """Post a body to an application that then receives `messages`, each after `wait` seconds; return its answers."""
    sent: list[Message] = []
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}, *messages]

    async def receive() -> Message:
        if len(incoming) <= len(messages):
            await asyncio.sleep(wait)
        if not incoming:
            await asyncio.Event().wait()
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/embeddings",
        "raw_path": b"/v1/embeddings",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
    }
    await app(scope, receive, send)
    return sent


def test_a_client_that_leaves_is_cancelled(encoder: Encoder, make_image: MakeImage) -> None:
    metrics = Metrics()
    engine = Engine(encoder, dataclasses.replace(LIMITS, max_wait=3.6e6), metrics.count_pack)  # nothing is computed
    app = make_app(Service(engine, metrics, "pets"), Access())
    body = json.dumps({"input": uri(make_image())}).encode()
    assert asyncio.run(exchange(app, body, [{"type": "http.disconnect"}], wait=0.1)) == []
    assert engine.pending == 0
    engine.close()
    values = metrics.registry.get_sample_value
    assert values("ijepa_images_total") == 0
    assert values("ijepa_requests_total", {"path": "/v1/embeddings", "status": "499"}) == 1


def test_a_request_that_takes_too_long_is_cancelled(encoder: Encoder, make_image: MakeImage) -> None:
    engine = Engine(encoder, dataclasses.replace(LIMITS, max_wait=3.6e6, timeout=0.2))
    app = make_app(Service(engine, Metrics(), "pets"), Access())
    body = json.dumps({"input": uri(make_image())}).encode()
    start, content = asyncio.run(exchange(app, body, []))
    assert start["status"] == 503
    assert json.loads(content["body"])["error"]["message"] == "The request took longer than 0.2 s."
    assert engine.pending == 0
    engine.close()


def test_a_body_that_does_not_arrive_is_not_waited_for(service: Service, encoder: Encoder) -> None:
    engine = Engine(encoder, dataclasses.replace(LIMITS, timeout=0.2))
    app = make_app(Service(engine, Metrics(), "pets"), Access())
    first: Message = {"type": "http.request", "body": b"{", "more_body": True}

    async def slowly() -> list[Message]:
        sent: list[Message] = []
        incoming = [first]

        async def receive() -> Message:
            if not incoming:
                await asyncio.Event().wait()
            return incoming.pop()

        async def send(message: Message) -> None:
            sent.append(message)

        await app({"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": []}, receive, send)
        return sent

    start, content = asyncio.run(slowly())
    assert start["status"] == 408
    assert json.loads(content["body"])["error"]["message"] == "The body did not arrive within 0.2 s."
    engine.close()
