"""The command on a real port: what it prints, that it finishes what it has accepted, and what it refuses to start."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ijepa_enhanced import cli
from ijepa_enhanced.encoder import Encoder

MakeImage = Callable[..., bytes]
Start = Callable[..., Any]


def body_of(*images: bytes) -> bytes:
    return json.dumps({"input": [{"image": base64.b64encode(image).decode()} for image in images]}).encode()


def test_a_service_answers_and_finishes_all_that_it_has_accepted(
    start: Start, encoder: Encoder, make_image: MakeImage
) -> None:
    running = start("--max-bytes", "100000")
    status, content = running.post(body_of(make_image()))
    assert (status, content["model"]) == (200, "pets")
    (expected,) = encoder.embed([make_image()]).numpy()
    found = np.array(content["data"][0]["embedding"], np.float32)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-6  # as in test_engine.py

    # A client that sends more than is read still sees the answer.
    assert running.post(b"x" * 5_000_000)[0] == 413

    outcomes: Counter[str] = Counter()
    many = threading.Event()

    def load(seed: int) -> None:
        body = body_of(*(make_image(30 + seed, 40, seed) for _ in range(4)))
        with contextlib.suppress(ConnectionRefusedError):  # the service has ended
            while True:
                try:
                    outcomes[str(running.post(body)[0])] += 1
                except (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected):
                    outcomes["not accepted"] += 1
                if outcomes["200"] > 20:
                    many.set()

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    assert many.wait(60)
    code, said = running.end()
    for thread in threads:
        thread.join()
    assert code == 0
    assert outcomes.keys() <= {"200", "not accepted"}
    # Every request that the service has read is one that a client has a whole answer to.
    assert said.splitlines()[-1] == f"Stopped after {outcomes['200'] + 2} requests."


@pytest.mark.slow
def test_ctrl_c_ends_a_service_as_well_and_json_tells_where_it_is(start: Start) -> None:
    running = start("--json")
    assert running.process.stdout is not None
    assert json.loads(running.process.stdout.readline()) == {"url": f"http://{running.host}"}
    code, said = running.end(signal.SIGINT)
    assert code == 0
    assert "Traceback" not in said


def ijepa(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and last line of stderr of a command that does not start a service."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return code, err.getvalue().splitlines()[-1]


def test_a_port_in_use_is_named(saved: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert ijepa("serve", saved, "--port", str(port)) == (
            2,
            f"ijepa: Port {port} is in use. Choose another one with --port.",
        )


def test_an_address_that_is_not_ours_is_named(saved: Path) -> None:
    code, said = ijepa("serve", saved, "--host", "192.0.2.1", "--port", "0")
    assert code == 2
    assert said.startswith("ijepa: Cannot listen on --host 192.0.2.1, --port 0: ")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    code, said = ijepa("serve", tmp_path / "none", "--port", "0")
    assert code == 2
    assert str(tmp_path / "none") in said


@pytest.mark.parametrize("content", [None, b"", b"two words", b"\xff"])
def test_a_file_without_a_token_is_named(saved: Path, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    code, said = ijepa("serve", saved, "--port", "0", "--token-file", file)
    assert code == 2
    assert said.startswith(f"ijepa: --token-file {file} ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "65536"), "--port must be at most 65535, not 65536."),
        (("--timeout", "0"), "--timeout must be at least 1, not 0.0."),
        (("--max-wait", "-1"), "--max-wait must be at least 0, not -1.0."),
        (("--max-images", "0"), "--max-images must be at least 1, not 0."),
        (
            ("--queue", "8"),
            "--queue must be at least --max-images (64), not 8: a full request would never have room.",
        ),
        (("--cors", "*"), "--cors needs origins such as https://example.org, not '*'."),
        (
            ("--cors", "https://example.org/"),
            "--cors needs origins such as https://example.org, not 'https://example.org/'.",
        ),
    ],
)
def test_a_wrong_option_is_named(saved: Path, options: tuple[str, ...], message: str) -> None:
    assert ijepa("serve", saved, *options) == (2, f"ijepa: {message}")


@pytest.mark.slow
def test_schemathesis_finds_nothing(start: Start) -> None:
    running = start()
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"http://{running.host}/openapi.json"),
        *("--max-examples", "50", "--seed", "0"),
        # A text that is no image fits the schema, and is refused.
        *("--exclude-checks", "positive_data_acceptance"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, check=False)
    assert done.returncode == 0, done.stdout
    assert running.end()[0] == 0
