"""The HTTP side of the shop: `uvicorn shop.web:app`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from .database import Session, create_tables, engine
from .orders import OrderForm, Refused, place_order


async def create_order(request: Request) -> JSONResponse:
    """Answer 201 with the order, 200 if its Idempotency-Key was there before, 409 if there is not enough left."""
    try:
        form = OrderForm.model_validate_json(await request.body())
    except ValidationError as error:
        return JSONResponse({"error": error.errors(include_url=False, include_input=False)}, 422)
    try:
        async with Session.begin() as session:
            order, is_new = await place_order(session, form, request.headers.get("Idempotency-Key"))
    except Refused as refused:
        return JSONResponse({"error": str(refused)}, refused.status)
    # Only now, after the commit, is there anything to tell.
    return JSONResponse({"id": order.id, "cents": order.cents}, 201 if is_new else 200)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    await create_tables()
    yield
    await engine.dispose()


app = Starlette(routes=[Route("/orders", create_order, methods=["POST"])], lifespan=lifespan)
