"""A small reviewer with its policy as a service on loopback, in a thread of the test."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import uvicorn

from vidreason.answering.loaded import LoadedModel
from vidreason.answering.recipe import build_generator, with_policy
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.task import ClassSpec, Task
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.decisions.deciders import ReviewDecider
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.lightning_modules.weights.answering import Answering
from vidreason.lightning_modules.weights.reviewer import ReviewerPair
from vidreason.serving.app import make_app
from vidreason.serving.draining import DrainingServer
from vidreason.serving.engine import Engine
from vidreason.serving.limits import ServingOptions
from vidreason.serving.requests import About
from vidreason.serving.service import Service

TASK = Task("light", "How light is it?", (ClassSpec("dark"), ClassSpec("bright", "light, very"), ClassSpec("grey")))
NAME = "light-run"


class Reply(NamedTuple):
    """A response, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: Any


def load_reviewer(base: Path, known: Mapping[bytes, Clip] | None = None) -> LoadedModel:
    """Returns a policy and a calibrator whose adapters differ from their base and from each other."""
    vlm = TinyVLM(path=str(base), lora=LoRAOptions(r=4, target_modules=("q_proj", "v_proj")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pair = ReviewerPair(vlm, LoRAOptions())
        model = pair.attach(vlm.build(), None).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    described = {
        "by": "review",
        "input": "video+trace",
        "samples": 2,
        "sampling": {"max_new_tokens": 8},
        "form": {},
        "clips_per_forward": None,
        "seed": 3,
    }
    generator = build_generator(described, TASK, vlm, "")
    assert generator is not None
    answering = Answering(
        vlm, model, ReviewDecider(TASK, "video+trace", 1.7), with_policy(generator, pair.policy_active)
    )
    return LoadedModel(
        answering=answering,
        task=TASK,
        frames=FrameOptions(num_frames=4),
        seed=3,
        find_known=lambda path: (known or {}).get(path.read_bytes()),
        answers="stage calibration",
        threshold=None,
        fabric=L.Fabric(accelerator="cpu", devices=1),
        weights_sha="",
        precision="32-true",
    )


def threshold(confidence: float, samples: int = 2) -> Threshold:
    """Returns a threshold that accepts decisions of at least a confidence."""
    return Threshold(confidence, 1.7, 0.1, 0.09, 40, 2, 0.8, "", samples)


def make_service(loaded: LoadedModel, **options: Any) -> Service:
    """Returns a service of a model."""
    limits = ServingOptions(**{"decoders": 1, **options})
    engine = Engine(loaded, limits.batch_size)
    return Service(engine, About.of(engine, NAME, 1_790_000_000.0), limits)


@contextmanager
def running(service: Service, **guard: Any) -> Iterator[int]:
    """Serves in a thread within the block; yields the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)  # connections wait until the thread has started
        config = uvicorn.Config(make_app(service, **guard), http="h11", ws="none", log_level="warning", lifespan="on")
        server = DrainingServer(config, service)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            service.stopping = True
            thread.join(60)
            assert not thread.is_alive()


def call(
    port: int, path: str, body: bytes | Mapping[str, Any] | None = None, method: str = "", **headers: str
) -> Reply:
    """Sends a request; a mapping goes as JSON. Underscores in names of headers are dashes."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(body, Mapping):
        body, sent = json.dumps(body).encode(), {"content-type": "application/json", **sent}
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
        response = connection.getresponse()
        text = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        is_json = found.get("content-type") == "application/json"
        return Reply(response.status, found, json.loads(text) if is_json else text.decode())
    finally:
        connection.close()
