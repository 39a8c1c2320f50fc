"""Results of very many small parts."""

from __future__ import annotations

import torch

from patchwire.v1 import job_pb2, tensor_pb2
from patchwire_worker.config import MIB
from patchwire_worker.scheduler import Saved
from patchwire_worker.service import _messages


def test_very_many_small_values_are_told_in_messages_that_are_not_too_long():
    news = [Saved(node, torch.float32, torch.Size([1] * 64)) for node in range(50_000)]

    messages = list(_messages(job_pb2.FetchJobResponse, news, tensor_pb2.COMPRESSION_UNSPECIFIED))

    assert sum(event.HasField("saved") for each in messages for event in each.events) == len(news)
    assert max(each.ByteSize() for each in messages) < 2 * MIB
