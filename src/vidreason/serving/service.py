"""The service: admits requests, decodes their clips side by side, and lets them through the model together."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi import Request

from vidreason.datamodules.clips import helper_process
from vidreason.datamodules.clips.decoded import DecodedVideo, DecodeError
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.clips.time_limit import call_reader
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.inference_data import INFERENCE_SPLIT
from vidreason.datamodules.types import Clip
from vidreason.serving.bodies import read_body
from vidreason.serving.engine import Answer, Engine, Job, Refused
from vidreason.serving.errors import ApiError
from vidreason.serving.limits import Budget, ServingOptions
from vidreason.serving.media import Media, Uploads
from vidreason.serving.requests import About, Timing, Wanted

_LOG = logging.getLogger(__name__)
_DECODE_S = 30.0  # where the run sets no limit
_MOST_RETRY_S = 30
_GATHER_S = 0.005  # for which a free model waits for further clips

Parse = Callable[[bytes, Mapping[str, str]], tuple[Wanted, Media]]
"""From a body and the request's headers to the questions and the clip; it runs in a thread."""


@dataclass(frozen=True)
class Answered:
    """The answer to a request, with the clip that it is about."""

    wanted: Wanted
    answer: Answer
    clip: Clip
    video: DecodedVideo
    timing: Timing


@dataclass(frozen=True)
class _Waiting:
    job: Job
    result: asyncio.Future[Answer | Refused]


class Service:
    """Answers requests with one model.

    Args:
        engine: The model; one thread uses it.
        about: What clients are told about it.
        options: Limits.
    """

    def __init__(self, engine: Engine, about: About, options: ServingOptions) -> None:
        self.engine, self.about, self.options = engine, about, options
        self.memory = Budget(options.memory, "memory for requests")
        self.uploads = Uploads(Budget(options.uploads, "temporary folder"))
        self.active = 0
        """Requests that were accepted and are not answered yet."""
        self.stopping = False
        frames = engine.frames
        self._frames = replace(frames, timeout=frames.timeout or _DECODE_S, cache=None)
        self._decoders = ThreadPoolExecutor(options.decoders, "decoder")
        self._model = ThreadPoolExecutor(1, "model")
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._last_s = 1.0
        self._batches: asyncio.Task[None] | None = None
        # torchcodec imports torch, whose libraries for GPUs alone take more address space
        helper_process.limit_memory(None if frames.reader == "torchcodec" else options.clip_memory)

    def start(self) -> None:
        """Begins to answer; called in the event loop."""
        self._batches = asyncio.create_task(self._answer_batches())
        for _ in range(self.options.decoders):  # starts their helper processes
            self._decoders.submit(call_reader, os.path.exists, self.uploads.folder, timeout=_DECODE_S)

    async def close(self) -> None:
        """Ends the threads and removes the temporary folder."""
        if self._batches is not None:
            self._batches.cancel()
            with suppress(asyncio.CancelledError):
                await self._batches
        for threads in (self._decoders, self._model):
            await asyncio.to_thread(threads.shutdown, wait=True, cancel_futures=True)
        helper_process.limit_memory(None)
        self.uploads.close()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request as accepted within the block.

        Raises:
            ApiError: If the service is stopping (503) or has enough to do (429).
        """
        if self.stopping:
            raise ApiError(503, "the service is stopping", code="stopping", retry_after=5)
        if self.active >= self.options.waiting:
            message = f"{self.active} requests are waiting already; try again later"
            raise ApiError(429, message, code="too_many_requests", retry_after=self._retry_s())
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    async def ask(self, request: Request, parse: Parse) -> Answered:
        """Reads a request and answers it.

        Raises:
            ApiError: If that is not possible.
        """
        start = time.perf_counter()
        with ExitStack() as stack:
            wanted, path = await self._receive(request, parse, stack)
            uploaded = time.perf_counter()
            try:
                async with asyncio.timeout(self.options.deadline_s):
                    clip, video = await asyncio.get_running_loop().run_in_executor(self._decoders, self._read, path)
                    stack.enter_context(self.memory.lease()).grow(video.frames.nbytes)
                    decoded = time.perf_counter()
                    answer = await self._through_model(wanted, clip, video)
            except TimeoutError as error:
                message = f"not answered within {self.options.deadline_s:g} seconds"
                raise ApiError(503, message, code="deadline", retry_after=self._retry_s()) from error
        waited = max(time.perf_counter() - decoded - answer.seconds, 0.0)
        timing = Timing(uploaded - start, decoded - uploaded, waited, answer.seconds)
        return Answered(wanted, answer, clip, video, timing)

    async def _receive(self, request: Request, parse: Parse, stack: ExitStack) -> tuple[Wanted, Path]:
        """Returns the questions of a request and the file of its clip; its body is not in memory any more."""
        with self.memory.lease() as lease:
            body = await read_body(request, self.options, lease)
            return await asyncio.to_thread(self._store, body, request.headers, parse, stack)

    def _store(self, body: bytes, headers: Mapping[str, str], parse: Parse, stack: ExitStack) -> tuple[Wanted, Path]:
        wanted, media = parse(body, headers)
        if wanted.others.questions and not self.engine.other_questions:
            asked = f"this service answers the question of its run only: {self.engine.task.question!r} with its classes"
            raise ApiError(422, asked, code="other_question")
        return wanted, stack.enter_context(self.uploads.file(media))

    def _read(self, path: Path) -> tuple[Clip, DecodedVideo]:
        """Decodes an uploaded clip; called in a thread that has a helper process.

        Raises:
            ApiError: If it cannot be read (422).
        """
        try:
            video = read_frames(path, self._frames)
            known = self.engine.find_known(path)
            sha = "" if known is not None else call_reader(content_sha, path, timeout=self._frames.timeout)
        except (DecodeError, OSError) as error:
            why = str(error).replace(f"{path}: ", "").replace(str(path), "the clip").replace(path.name, "the clip")
            raise ApiError(422, f"the clip cannot be read: {why[:500]}", code="unreadable_clip") from error
        if known is None:
            return Clip(path, None, f"sha256 {sha}"), video
        return replace(known, path=path, label=None, split=INFERENCE_SPLIT), video

    async def _through_model(self, wanted: Wanted, clip: Clip, video: DecodedVideo) -> Answer:
        job = Job(clip, video, any(wanted.own), wanted.others, wanted.samples)
        waiting = _Waiting(job, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        found = await waiting.result
        if isinstance(found, Refused):
            if found.by_request:
                raise ApiError(400, f"the model cannot be asked this: {found.why[:500]}", code="unanswerable")
            _LOG.error("no answer about %s: %s", clip.video_id, found.why)
            raise ApiError(500, "the model failed on this clip; the log of the service says why", code="model_failed")
        return found

    async def _answer_batches(self) -> None:
        """Takes what waits through the model, several requests at a time."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            await asyncio.sleep(_GATHER_S)
            while len(batch) < self.options.batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [waiting for waiting in batch if not waiting.result.done()]  # cancelled by its deadline
            if not batch:
                continue
            running = loop.run_in_executor(self._model, self.engine.answer, [waiting.job for waiting in batch])
            await asyncio.wait([running])
            error = running.exception()
            for number, waiting in enumerate(batch):
                if waiting.result.done():
                    continue
                if error is not None:
                    waiting.result.set_exception(error)
                else:
                    waiting.result.set_result(running.result()[number])
            if error is None:
                answer = running.result()[0]
                self._last_s = answer.seconds if isinstance(answer, Answer) else self._last_s

    def _retry_s(self) -> int:
        """Returns about how many seconds the requests that wait will take."""
        batches = math.ceil(self.active / self.options.batch_size)
        return min(max(math.ceil(batches * self._last_s), 1), _MOST_RETRY_S)
