# jobq and the example shop. Which process a container is, its command says: see docker-compose.yml.
#
#   docker build --tag jobq .
#   docker run --rm jobq jobq version
FROM python:3.13-slim AS build
RUN python -m venv /opt/jobq
WORKDIR /source
COPY pyproject.toml README.md LICENSE jobq_pytest.py ./
COPY jobq jobq
COPY migrations migrations
COPY examples examples
# The last four are the shop's.
RUN /opt/jobq/bin/pip install --no-cache-dir '.[uvloop]' aiosmtpd aiosmtplib starlette uvicorn

FROM python:3.13-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin jobq
COPY --from=build /opt/jobq /opt/jobq
COPY examples/shop /app/shop
ENV PATH=/opt/jobq/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001:10001
CMD ["jobq", "--help"]
