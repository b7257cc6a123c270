"""Submit jobs and take their results.

    from fallow.client import Bundle, connect

    with connect() as client:
        job = client.map(Bundle.from_onnx("model.onnx"), "rows.parquet", data="public", keep=["id"])
        for row in job.results():
            print(row.position, row.status, row.values)
        job.save("out.parquet")

`connect_async`, `AsyncClient` and `AsyncJob` are the same for asynchronous code.
"""

from __future__ import annotations

from fallow.bundle import Precision
from fallow.bundle_file import Bundle
from fallow.certificate import Certificate
from fallow.client.blocking import Client, Job, connect
from fallow.client.client import AsyncClient, BundleState, Session, connect_async
from fallow.client.job import AsyncJob, Order
from fallow.client.results import STATUS_FAILED, RowFailure, RowResult
from fallow.client.tables import Saved
from fallow.errors import FallowError, Reason
from fallow.job import JobOptions, JobProgress, JobState, JobStatus, WorkerShare
from fallow.roles import DataClass
from fallow.sources import ArraySource, FolderSource, ParquetSource, Rows, Source, TableSource

__all__ = [
    "STATUS_FAILED",
    "ArraySource",
    "AsyncClient",
    "AsyncJob",
    "Bundle",
    "BundleState",
    "Certificate",
    "Client",
    "DataClass",
    "FallowError",
    "FolderSource",
    "Job",
    "JobOptions",
    "JobProgress",
    "JobState",
    "JobStatus",
    "Order",
    "ParquetSource",
    "Precision",
    "Reason",
    "RowFailure",
    "RowResult",
    "Rows",
    "Saved",
    "Session",
    "Source",
    "TableSource",
    "WorkerShare",
    "connect",
    "connect_async",
]
