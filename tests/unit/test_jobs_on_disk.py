"""Jobs whose disk is full, and results of very many small parts."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncGenerator, Iterator

import pytest
import torch

from patchwire.errors import ExecutionError
from patchwire.v1 import job_pb2, service_pb2, tensor_pb2
from patchwire_worker.config import MIB, Limits
from patchwire_worker.jobs import Jobs
from patchwire_worker.scheduler import Saved
from patchwire_worker.service import _messages

PATIENCE = 60


def response(length: int) -> job_pb2.FetchJobResponse:
    return job_pb2.FetchJobResponse(events=[service_pb2.Event(chunk=bytes(length))])


@pytest.fixture
def fill() -> Iterator[None]:
    """Makes the disk full: no file grows beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("length", [100, 100_000], ids=["at the end", "meanwhile"])
def test_a_job_ends_if_its_results_cannot_be_written(tmp_path, fill, length):
    async def scenario() -> None:
        jobs = Jobs(tmp_path, Limits())

        async def responses() -> AsyncGenerator[job_pb2.FetchJobResponse, None]:
            fill()
            yield response(length)

        job = await jobs.submit("me", "gpt2", responses(), expected_bytes=0, position=lambda: None)
        ended = await jobs.get("me", job.id, PATIENCE / 2)

        assert ended.state == job_pb2.JOB_STATE_FAILED
        with pytest.raises(ExecutionError, match="could not write the results to its disk"):
            await anext(jobs.fetch("me", job.id))
        await jobs.forget("me", job.id)
        assert jobs.of("me") == []
        await jobs.close()

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_very_many_small_values_are_told_in_messages_that_are_not_too_long():
    value = torch.zeros([1] * 64)
    news = [Saved(node, value) for node in range(50_000)]

    messages = list(_messages(job_pb2.FetchJobResponse, news, tensor_pb2.COMPRESSION_UNSPECIFIED))

    assert sum(event.HasField("saved") for each in messages for event in each.events) == len(news)
    assert max(each.ByteSize() for each in messages) < 2 * MIB
