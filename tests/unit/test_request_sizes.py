"""How long a request may be follows from the contract."""

from __future__ import annotations

from fallow.limits import CONTROL_MESSAGE_BYTES_MAX
from fallow.v1 import admin_service_pb2, job_service_pb2
from fallow_coordinator.service.calls import SIMPLE_REQUEST_BYTES_MAX, request_bytes_max


def test_requests_of_names_and_numbers_are_short_and_others_as_long_as_the_server_takes() -> None:
    assert request_bytes_max(job_service_pb2.GetJobRequest) == SIMPLE_REQUEST_BYTES_MAX
    assert request_bytes_max(admin_service_pb2.RevokePartyRequest) == SIMPLE_REQUEST_BYTES_MAX
    assert request_bytes_max(job_service_pb2.SubmitMapJobRequest) == CONTROL_MESSAGE_BYTES_MAX
    assert request_bytes_max(job_service_pb2.RegisterBundleRequest) == CONTROL_MESSAGE_BYTES_MAX
