"""Calls beside the contract, health and reflection: few at a time and for a short while, so that nobody holds a server
full with them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc

SIDE_CALLS_MAX: Final = 32
"""Health and reflection calls of one server at once."""
SIDE_CALL_TIME_MAX_S: Final = 60.0
"""A watch of health that lasts longer is ended; who watches asks again."""

# The behaviours of four kinds of call have no common type.
_Behaviour = Callable[[Any, Any], Awaitable[Any]]


class SideCallLimit(grpc.aio.ServerInterceptor):
    """Refuses one more health or reflection call than `SIDE_CALLS_MAX`, and ends those that stay."""

    def __init__(self, contract: str = "fallow.v1.") -> None:
        """Methods of packages that begin with `contract` have limits of their own and pass."""
        self._contract = f"/{contract}"
        self._running = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler itself, or one that counts."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(self._contract):
            return handler
        return self._limited(handler)

    def _limited(self, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        coders = (handler.request_deserializer, handler.response_serializer)
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream), *coders)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream), *coders)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._answer(handler.stream_unary), *coders)
        return grpc.unary_unary_rpc_method_handler(self._answer(handler.unary_unary), *coders)

    def _answer(self, behaviour: _Behaviour) -> Any:
        async def counted(request: Any, context: Any) -> Any:
            await self._enter(context)
            try:
                async with asyncio.timeout(SIDE_CALL_TIME_MAX_S):
                    return await behaviour(request, context)
            finally:
                self._running -= 1

        return counted

    def _stream(self, behaviour: Any) -> Any:
        """Both kinds of streaming behaviour exist beside the contract: generators and coroutines that write."""

        async def counted(request: Any, context: Any) -> None:
            await self._enter(context)
            try:
                async with asyncio.timeout(SIDE_CALL_TIME_MAX_S):
                    running = behaviour(request, context)
                    if hasattr(running, "__aiter__"):
                        async for response in running:
                            await context.write(response)
                    else:
                        await running
            except TimeoutError:
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"ended after {SIDE_CALL_TIME_MAX_S:g} s")
            finally:
                self._running -= 1

        return counted

    async def _enter(self, context: Any) -> None:
        if self._running >= SIDE_CALLS_MAX:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {SIDE_CALLS_MAX} health and reflection calls at once"
            )
        self._running += 1
